//! A small name server whose answers depend on the first label of the name.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;

use super::*;

/// The server; its threads end with the test process.
pub(super) struct Upstream {
    pub(super) address: SocketAddr,
    queries: Arc<Mutex<Vec<(String, &'static str)>>>,
}

impl Upstream {
    pub(super) fn start() -> Self {
        // UDP and TCP of one port.
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()) {
                break (udp, tcp);
            }
        };
        let server = Self { address: udp.local_addr().unwrap(), queries: Arc::default() };
        let queries = server.queries.clone();
        thread::spawn(move || serve_udp(&udp, &queries));
        let queries = server.queries.clone();
        thread::spawn(move || {
            for stream in tcp.incoming() {
                serve_tcp(&mut stream.unwrap(), &queries);
            }
        });
        server
    }

    /// Names that were asked, and over what.
    pub(super) fn queries(&self) -> Vec<(String, &'static str)> {
        self.queries.lock().unwrap().clone()
    }
}

type Queries = Mutex<Vec<(String, &'static str)>>;

fn serve_udp(socket: &UdpSocket, queries: &Queries) {
    let mut buffer = [0; 4096];
    while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
        let query = Message::from_vec(&buffer[..length]).unwrap();
        let name = query.queries[0].name().to_string();
        let before = {
            let mut queries = queries.lock().unwrap();
            queries.push((name.clone(), "udp"));
            queries.iter().filter(|(known, _)| *known == name).count() - 1
        };
        let reply = reply(&query);
        match name.split('.').next().unwrap() {
            "silent" => continue,
            "lossy" if before == 0 => continue,
            "slow" => thread::sleep(Duration::from_millis(500)),
            "spoofed" => {
                let mut other = reply.clone();
                other.metadata.id = !other.metadata.id;
                other.answers.clear();
                socket.send_to(&other.to_vec().unwrap(), peer).unwrap();
                other.metadata.id = reply.metadata.id;
                other.queries = super::query("other.example.", RecordType::A).queries;
                socket.send_to(&other.to_vec().unwrap(), peer).unwrap();
                socket.send_to(b"noise", peer).unwrap();
                socket.send_to(&buffer[..length], peer).unwrap();
            }
            _ => {}
        }
        let bytes = if reply.answers.len() > 10 {
            reply.truncate().to_vec().unwrap()
        } else {
            reply.to_vec().unwrap()
        };
        socket.send_to(&bytes, peer).unwrap();
    }
}

fn serve_tcp(stream: &mut TcpStream, queries: &Queries) {
    while let Ok(query) = read(stream) {
        let query = Message::from_vec(&query).unwrap();
        queries.lock().unwrap().push((query.queries[0].name().to_string(), "tcp"));
        let reply = reply(&query).to_vec().unwrap();
        let times = if query.queries[0].query_type() == RecordType::AXFR { 3 } else { 1 };
        for _ in 0..times {
            write(stream, &reply).unwrap();
        }
        if times > 1 {
            return;
        }
    }
}

fn reply(query: &Message) -> Message {
    let question = &query.queries[0];
    let mut reply = query.clone().into_response();
    reply.metadata.recursion_available = true;
    let record = |ip: [u8; 4]| {
        let data = match question.query_type() {
            RecordType::TXT => RData::TXT(TXT::new(vec!["from upstream".to_owned()])),
            _ => RData::A(A(ip.into())),
        };
        Record::from_rdata(question.name().clone(), 60, data)
    };
    match question.name().to_string().split('.').next().unwrap() {
        "nxdomain" => reply.metadata.response_code = ResponseCode::NXDomain,
        "refused" => reply.metadata.response_code = ResponseCode::Refused,
        "servfail" => reply.metadata.response_code = ResponseCode::ServFail,
        "large" => {
            reply.add_answers((0..60).map(|i| record([192, 0, 2, i])));
        }
        _ => {
            reply.add_answer(record([192, 0, 2, 7]));
        }
    }
    reply
}

/// Writes a message with its length.
pub(super) fn write(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let mut framed = u16::try_from(message.len()).unwrap().to_be_bytes().to_vec();
    framed.extend(message);
    stream.write_all(&framed)
}

/// Reads a message with its length.
pub(super) fn read(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message)?;
    Ok(message)
}
