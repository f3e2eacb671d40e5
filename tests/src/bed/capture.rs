//! Packet capture on the underlay with tcpdump, and a reader of what it saw.

use super::process::{Place, Proc};
use super::wait;
use anyhow::{Context, Result, bail};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Proc,
    file: PathBuf,
}

/// A TCP segment on the wire.
#[derive(Debug, Clone)]
pub struct Segment {
    /// Sender.
    pub from: SocketAddr,
    /// Receiver.
    pub to: SocketAddr,
    /// Whether it opens a connection (SYN without ACK).
    pub syn: bool,
    /// Its bytes.
    pub payload: Vec<u8>,
}

impl Capture {
    /// Starts tcpdump on a device of a network namespace (its file) and waits until it listens.
    ///
    /// # Errors
    /// tcpdump is missing or cannot open the device.
    pub fn start(netns: &Path, cgroup: &Path, device: &str, dir: &Path) -> Result<Self> {
        let file = dir.join(format!("capture-{device}.pcap"));
        let log = dir.join(format!("tcpdump-{device}.log"));
        let _ = std::fs::remove_file(&file);
        let _ = std::fs::remove_file(&log);
        let place = Place { netns: netns.to_owned(), cgroup: cgroup.to_owned(), resolv: None };
        let name = file.to_string_lossy().into_owned();
        let argv = [
            "tcpdump",
            "-i",
            device,
            "-s",
            "0",
            "-U",
            "-n",
            "--immediate-mode",
            "-B",
            "16384",
            "-Z",
            "root",
            "-w",
            &name,
        ];
        let mut tcpdump = Proc::spawn(&place, argv, &log)?;
        wait::until_true("tcpdump that listens", Duration::from_secs(10), || {
            if !tcpdump.running()? {
                bail!("tcpdump ended: {}", tcpdump.log().trim());
            }
            Ok(tcpdump.log().contains("listening on"))
        })?;
        Ok(Self { tcpdump, file })
    }

    /// Ends the capture and reads it.
    ///
    /// # Errors
    /// tcpdump does not end, or wrote no readable file.
    pub fn stop(mut self) -> Result<Vec<Segment>> {
        self.tcpdump.signal(rustix::process::Signal::TERM)?;
        self.tcpdump.wait(Duration::from_secs(10))?;
        let bytes =
            std::fs::read(&self.file).with_context(|| format!("cannot read {}", self.file.display()))?;
        read(&bytes)
    }
}

/// Whether any segment between two addresses carries these bytes.
pub fn carries(segments: &[Segment], bytes: &[u8]) -> bool {
    segments.iter().any(|segment| segment.payload.windows(bytes.len()).any(|window| window == bytes))
}

/// Reads the classic pcap format with Ethernet frames.
///
/// # Errors
/// Another format.
pub fn read(bytes: &[u8]) -> Result<Vec<Segment>> {
    let magic = bytes.get(..4).context("the capture is empty")?;
    let little = match magic {
        [0xd4, 0xc3, 0xb2, 0xa1] | [0x4d, 0x3c, 0xb2, 0xa1] => true,
        [0xa1, 0xb2, 0xc3, 0xd4] | [0xa1, 0xb2, 0x3c, 0x4d] => false,
        _ => bail!("not a pcap file"),
    };
    let word = |at: usize| -> Option<u32> {
        let bytes: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
        Some(if little { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) })
    };
    let mut segments = Vec::new();
    let mut at = 24;
    while let Some(length) = word(at + 8) {
        let Some(frame) = bytes.get(at + 16..at + 16 + length as usize) else { break };
        segments.extend(ethernet(frame));
        at += 16 + length as usize;
    }
    Ok(segments)
}

fn ethernet(frame: &[u8]) -> Option<Segment> {
    let packet = frame.get(14..)?;
    match frame.get(12..14)? {
        [0x08, 0x00] => {
            let header = usize::from(packet.first()? & 0x0f) * 4;
            // A fragment that is not the first has no TCP header.
            let fragment = u16::from_be_bytes(packet.get(6..8)?.try_into().ok()?) & 0x1fff;
            if *packet.get(9)? != 6 || fragment != 0 {
                return None;
            }
            let total = usize::from(u16::from_be_bytes(packet.get(2..4)?.try_into().ok()?));
            let end = if total == 0 { packet.len() } else { total.min(packet.len()) };
            let from = Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(12..16)?).ok()?);
            let to = Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(16..20)?).ok()?);
            tcp(from.into(), to.into(), packet.get(header..end)?)
        }
        [0x86, 0xdd] => {
            if *packet.get(6)? != 6 {
                return None;
            }
            let from = Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(8..24)?).ok()?);
            let to = Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(24..40)?).ok()?);
            tcp(from.into(), to.into(), packet.get(40..)?)
        }
        _ => None,
    }
}

fn tcp(from: IpAddr, to: IpAddr, segment: &[u8]) -> Option<Segment> {
    let port = |at: usize| Some(u16::from_be_bytes(segment.get(at..at + 2)?.try_into().ok()?));
    let offset = usize::from(segment.get(12)? >> 4) * 4;
    Some(Segment {
        from: (from, port(0)?).into(),
        to: (to, port(2)?).into(),
        syn: segment.get(13)? & 0x12 == 0x02,
        payload: segment.get(offset..)?.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_captured_frame_shows_its_addresses_and_bytes() {
        let mut packet = vec![0x45, 0, 0, 42, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        packet.extend([0x1f, 0x90, 0x3a, 0xa0, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0, 0, 0, 0, 0, 0]);
        packet.extend(b"hi");
        packet.extend([0; 4]); // Ethernet padding is no payload
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00]);
        frame.extend(packet);
        let mut file = vec![0xd4, 0xc3, 0xb2, 0xa1];
        file.resize(24, 0);
        file.extend([0; 8]);
        file.extend(u32::try_from(frame.len()).unwrap().to_le_bytes());
        file.extend([0; 4]);
        file.extend(&frame);
        let segments = read(&file).unwrap();
        assert_eq!(segments.len(), 1);
        assert_eq!(segments[0].to, "10.0.0.2:15008".parse().unwrap());
        assert!(segments[0].syn && carries(&segments, b"hi"));
        assert_eq!(segments[0].payload, b"hi");
    }
}
