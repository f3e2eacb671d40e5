//! Whatever a name server sends back, or somebody in its place. Input: the length of a query, the query, the datagram.
//!
//! - Only what has the query's id and question is taken for its answer.
//! - What is cut for a client that cannot take all of it still answers the query, says that it is cut, and can be read.
#![no_main]

use hickory_proto::op::Message;
use libfuzzer_sys::fuzz_target;
use mesh_node::dns::message;

const HEADER: usize = 12;

fuzz_target!(|data: &[u8]| {
    let Some((length, rest)) = data.split_first_chunk::<2>() else { return };
    let length = usize::from(u16::from_be_bytes(*length)).min(rest.len());
    let (bytes, reply) = rest.split_at(length);
    let Ok(query) = message::read(bytes) else { return };
    let cut = message::cut(reply, &query.question);
    assert!(cut.len() <= query.question.end && cut.len() <= reply.len());
    assert_eq!(message::cut(&cut, &query.question), cut, "cut once, cut for good");
    assert_eq!(message::is_truncated(&cut), cut.len() >= HEADER || message::is_truncated(reply));
    if !message::is_answer(reply, bytes, &query.question) {
        return;
    }
    assert_eq!(reply[..2], bytes[..2]);
    assert!(message::is_answer(&cut, bytes, &query.question), "a cut answer answers");
    let read = Message::from_vec(&cut).expect("the client can read it");
    assert_eq!(read.metadata.id, query.message.metadata.id);
    assert!(read.answers.is_empty() && read.metadata.truncation);
    // Asked about another name, the same datagram is no answer.
    let mut other = bytes.to_vec();
    let first = &mut other[query.question.start + 1];
    if reply[4..6] == [0, 1] && first.is_ascii_alphanumeric() && bytes[query.question.start] > 0 {
        *first = if first.eq_ignore_ascii_case(&b'a') { b'b' } else { b'a' };
        assert!(!message::is_answer(reply, &other, &query.question));
    }
});
