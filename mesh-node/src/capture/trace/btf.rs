//! What the running kernel's type information (BTF) says: where fields are in its structures, what tracepoints are called
//! with, and the names of its enumerations. Rust emits no relocations that a loader could patch, so the programs are told.

use std::collections::HashMap;

const MAGIC: u16 = 0xeb9f;
const POINTER: u32 = 2;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const FUNCTION: u32 = 13;
/// The kernel declares the function of a tracepoint's probes as a type of this name and the tracepoint's.
const TRACEPOINT: &[u8] = b"btf_trace_";
/// Kinds that only name another type.
const TRANSPARENT: [u32; 5] = [8, 9, 10, 11, 18];
/// Structures within structures that are followed; the kernel's go four deep.
const DEPTH: usize = 8;

/// Parsed type information: where each type's record begins, and structures by name.
pub(super) struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// By number of the type, which begins with 1.
    records: Vec<usize>,
    structures: HashMap<&'a [u8], usize>,
    enumerations: HashMap<&'a [u8], usize>,
    /// Of tracepoints, by the tracepoint's name.
    probes: HashMap<&'a [u8], usize>,
}

/// One member of a structure.
struct Member<'a> {
    name: &'a [u8],
    kind: usize,
    bits: u32,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Bytes behind a type's record: by kind, and number of its members.
const fn tail(kind: u32, members: usize) -> Option<usize> {
    Some(match kind {
        2 | 7..=12 | 16 | 18 => 0,
        1 | 14 | 17 => 4,
        3 => 12,
        4 | 5 | 15 | 19 => members * 12,
        6 | 13 => members * 8,
        _ => return None,
    })
}

impl<'a> Btf<'a> {
    /// Reads the sections; nothing if they are not what a kernel writes.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        if u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?) != MAGIC {
            return None;
        }
        let header = word(bytes, 4)? as usize;
        let section = |at: usize| {
            let start = header + word(bytes, at)? as usize;
            bytes.get(start..start + word(bytes, at + 4)? as usize)
        };
        let (types, strings) = (section(8)?, section(16)?);
        let mut parsed = Self {
            types,
            strings,
            records: vec![0],
            structures: HashMap::new(),
            enumerations: HashMap::new(),
            probes: HashMap::new(),
        };
        let mut at = 0;
        while at < types.len() {
            let (name, kind, members) = parsed.record(at)?;
            match kind {
                STRUCT | UNION if !name.is_empty() => _ = parsed.structures.entry(name).or_insert(at),
                ENUM if !name.is_empty() => _ = parsed.enumerations.entry(name).or_insert(at),
                TYPEDEF => {
                    if let Some(name) = name.strip_prefix(TRACEPOINT) {
                        parsed.probes.insert(name, at);
                    }
                }
                _ => {}
            }
            parsed.records.push(at);
            at += 12 + tail(kind, members)?;
        }
        Some(parsed)
    }

    /// Name, kind and number of members of the type at an offset.
    fn record(&self, at: usize) -> Option<(&'a [u8], u32, usize)> {
        let info = word(self.types, at + 4)?;
        Some((self.name(word(self.types, at)?)?, info >> 24 & 0x1f, (info & 0xffff) as usize))
    }

    fn name(&self, at: u32) -> Option<&'a [u8]> {
        self.strings.get(at as usize..)?.split(|byte| *byte == 0).next()
    }

    fn members(&self, at: usize) -> Option<Vec<Member<'a>>> {
        let info = word(self.types, at + 4)?;
        let bitfields = info >> 31 == 1;
        let member = |index: usize| {
            let at = at + 12 + index * 12;
            let offset = word(self.types, at + 8)?;
            Some(Member {
                name: self.name(word(self.types, at)?)?,
                kind: word(self.types, at + 4)? as usize,
                bits: if bitfields { offset & 0x00ff_ffff } else { offset },
            })
        };
        (0..(info & 0xffff) as usize).map(member).collect()
    }

    /// Number and name of each member of an enumeration; none of one that this kernel does not have.
    pub(super) fn enumerators(&self, name: &str) -> Vec<(u32, String)> {
        let read = || -> Option<Vec<(u32, String)>> {
            let at = *self.enumerations.get(name.as_bytes())?;
            let (_, _, members) = self.record(at)?;
            let member = |index: usize| {
                let at = at + 12 + index * 8;
                let name = self.name(word(self.types, at)?)?;
                Some((word(self.types, at + 4)?, String::from_utf8_lossy(name).into_owned()))
            };
            (0..members).map(member).collect()
        };
        read().unwrap_or_default()
    }

    /// How many arguments a tracepoint has; nothing where this kernel has no such tracepoint.
    pub(super) fn arguments(&self, tracepoint: &str) -> Option<usize> {
        let named = |at: usize| self.records.get(word(self.types, at + 8)? as usize).copied();
        let pointer = named(*self.probes.get(tracepoint.as_bytes())?)?;
        let function = named(pointer)?;
        match (self.record(pointer)?, self.record(function)?) {
            // The first is the probe's own.
            ((_, POINTER, _), (_, FUNCTION, count)) => count.checked_sub(1),
            _ => None,
        }
    }

    /// The structure that a type is, behind the names that it goes by.
    fn structure(&self, kind: usize) -> Option<usize> {
        let mut at = *self.records.get(kind)?;
        for _ in 0..DEPTH {
            let (_, kind, _) = self.record(at)?;
            if matches!(kind, STRUCT | UNION) {
                return Some(at);
            }
            if !TRANSPARENT.contains(&kind) {
                return None;
            }
            at = *self.records.get(word(self.types, at + 8)? as usize)?;
        }
        None
    }

    /// Bits from a structure's start to a member, also one of a nameless structure in it; and the member's type.
    fn find(&self, at: usize, name: &[u8], depth: usize) -> Option<(u32, usize)> {
        let members = self.members(at)?;
        if let Some(member) = members.iter().find(|member| member.name == name) {
            return Some((member.bits, member.kind));
        }
        let nameless = members.iter().filter(|member| member.name.is_empty() && depth > 0);
        nameless
            .filter_map(|member| {
                let (bits, kind) = self.find(self.structure(member.kind)?, name, depth - 1)?;
                Some((member.bits + bits, kind))
            })
            .next()
    }

    /// Bytes from the start of a structure to a field, given by the names on the way to it.
    pub(super) fn offset(&self, structure: &str, path: &[&str]) -> Option<u32> {
        let mut at = *self.structures.get(structure.as_bytes())?;
        let mut bits = 0;
        for (index, name) in path.iter().enumerate() {
            let (found, kind) = self.find(at, name.as_bytes(), DEPTH)?;
            bits += found;
            if index + 1 < path.len() {
                at = self.structure(kind)?;
            }
        }
        (bits % 8 == 0).then_some(bits / 8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

    #[test]
    fn fields_of_the_running_kernel_are_found_through_nameless_structures() {
        let Ok(bytes) = std::fs::read(VMLINUX) else {
            eprintln!("skipped: this kernel has no {VMLINUX}");
            return;
        };
        let btf = Btf::parse(&bytes).unwrap();
        // The head of a socket is fixed by what user space sees of it (`bpf_sock`), and of a packet by its lists.
        assert_eq!(btf.offset("sock", &["__sk_common", "skc_daddr"]), Some(0));
        assert_eq!(btf.offset("sock", &["__sk_common", "skc_rcv_saddr"]), Some(4));
        assert_eq!(btf.offset("sk_buff", &["next"]), Some(0));
        assert_eq!(btf.offset("sk_buff", &["dev"]), Some(16));
        assert!(btf.offset("sk_buff", &["network_header"]).unwrap() > 64);
        assert!(btf.offset("net", &["net_cookie"]).unwrap() > 8);
        assert_eq!(btf.offset("sock", &["no_such_field"]), None);
        assert_eq!(btf.offset("no_such_structure", &["a"]), None);
    }

    #[test]
    fn tracepoints_of_the_running_kernel_have_arguments_and_reasons_have_names() {
        let Ok(bytes) = std::fs::read(VMLINUX) else {
            eprintln!("skipped: this kernel has no {VMLINUX}");
            return;
        };
        let btf = Btf::parse(&bytes).unwrap();
        // `TP_PROTO(const struct sock *sk)` since it is there; the others gained arguments.
        assert_eq!(btf.arguments("tcp_receive_reset"), Some(1));
        assert!(btf.arguments("kfree_skb") >= Some(3) && btf.arguments("tcp_retransmit_skb") >= Some(2));
        assert_eq!(btf.arguments("no_such_tracepoint"), None);
        let reasons = btf.enumerators("skb_drop_reason");
        assert!(reasons.contains(&(0, "SKB_NOT_DROPPED_YET".to_owned())), "{reasons:?}");
        assert!(reasons.iter().any(|(_, name)| name == "SKB_DROP_REASON_NO_SOCKET"), "{reasons:?}");
        assert_eq!(btf.enumerators("no_such_enumeration"), []);
    }

    #[test]
    fn what_is_cut_off_or_no_type_information_is_refused() {
        assert!(Btf::parse(b"").is_none());
        assert!(Btf::parse(&[0; 64]).is_none());
        let Ok(bytes) = std::fs::read(VMLINUX) else { return };
        for length in [3, 24, 1000, bytes.len() / 2] {
            assert!(Btf::parse(&bytes[..length]).is_none(), "{length} bytes");
        }
    }
}
