use super::*;
use hickory_proto::op::Edns;
use hickory_proto::rr::rdata::AAAA;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use proptest::prelude::*;
use std::net::Ipv6Addr;
use std::str::FromStr as _;

fn query(name: &str) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(hickory_proto::op::Query::query(Name::from_str(name).unwrap(), RecordType::AAAA));
    message
}

fn bytes(name: &str) -> Vec<u8> {
    query(name).to_vec().unwrap()
}

fn refused(bytes: &[u8]) -> (Refusal, Option<ResponseCode>) {
    let refused = read(bytes).expect_err("refused");
    let code = refused.reply.map(|reply| {
        let reply = Message::from_vec(&reply).unwrap();
        assert_eq!(reply.metadata.id.to_be_bytes(), bytes[..2], "the id is the query's");
        assert_eq!(reply.metadata.message_type, hickory_proto::op::MessageType::Response);
        reply.metadata.response_code
    });
    (refused.refusal, code)
}

#[test]
fn a_query_is_read_with_its_question() {
    let bytes = bytes("a.b.");
    let query = read(&bytes).unwrap();
    assert_eq!(query.question, 12..bytes.len());
    assert_eq!(query.message.queries[0].name().to_string(), "a.b.");
    assert_eq!(query.udp_limit(), 512);
}

#[test]
fn edns_raises_the_limit_of_udp_and_never_lowers_it() {
    for (told, limit) in [(100, 512), (512, 512), (1232, 1232), (65_535, 65_535)] {
        let mut message = query("a.");
        let mut edns = Edns::new();
        edns.set_max_payload(told);
        message.set_edns(edns);
        let mut bytes = message.to_vec().unwrap();
        // The library does not write less than 512; a client may.
        let class = bytes.len() - 8;
        bytes[class..class + 2].copy_from_slice(&told.to_be_bytes());
        assert_eq!(read(&bytes).unwrap().udp_limit(), limit);
    }
}

#[test]
fn what_is_no_query_is_dropped() {
    assert_eq!(refused(&[]), (Refusal::Short, None));
    assert_eq!(refused(&bytes("a.")[..11]), (Refusal::Short, None));
    let mut response = bytes("a.");
    response[2] |= 0x80;
    assert_eq!(refused(&response), (Refusal::Response, None));
}

#[test]
fn a_question_that_is_cut_off_is_a_format_error() {
    let whole = bytes("abc.example.");
    for length in 12..whole.len() {
        assert_eq!(refused(&whole[..length]), (Refusal::Malformed, Some(ResponseCode::FormErr)), "{length}");
    }
}

#[test]
fn none_or_several_questions_are_a_format_error() {
    for count in [0_u16, 2, 65_535] {
        let mut message = bytes("a.");
        message[4..6].copy_from_slice(&count.to_be_bytes());
        assert_eq!(refused(&message), (Refusal::Questions, Some(ResponseCode::FormErr)));
    }
}

#[test]
fn a_compressed_question_is_a_format_error_also_when_it_points_to_itself() {
    for pointer in [[0xc0, 12], [0xc0, 14], [0xc0, 0], [0xff, 0xff]] {
        let mut message = bytes("a.")[..12].to_vec();
        message.extend(pointer);
        message.extend([0, 1, 0, 1]);
        assert_eq!(refused(&message), (Refusal::Malformed, Some(ResponseCode::FormErr)));
    }
}

#[test]
fn a_loop_of_pointers_in_a_later_record_is_a_format_error() {
    let mut message = bytes("a.");
    message[11] = 1;
    let at = u8::try_from(message.len()).unwrap();
    message.extend([0xc0, at, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0]);
    assert_eq!(refused(&message), (Refusal::Malformed, Some(ResponseCode::FormErr)));
}

#[test]
fn counts_of_records_that_are_not_there_are_a_format_error() {
    let mut message = bytes("a.");
    message[6..12].fill(0xff);
    assert_eq!(refused(&message), (Refusal::Malformed, Some(ResponseCode::FormErr)));
}

#[test]
fn a_label_or_name_that_is_too_long_is_a_format_error() {
    let mut label = bytes("a.")[..12].to_vec();
    label.push(64);
    label.extend([b'a'; 64]);
    label.extend([0, 0, 1, 0, 1]);
    assert_eq!(refused(&label), (Refusal::Malformed, Some(ResponseCode::FormErr)));

    let mut name = bytes("a.")[..12].to_vec();
    for _ in 0..5 {
        name.push(63);
        name.extend([b'a'; 63]);
    }
    name.extend([0, 0, 1, 0, 1]);
    assert_eq!(refused(&name), (Refusal::Malformed, Some(ResponseCode::FormErr)));
}

#[test]
fn a_query_longer_than_any_is_a_format_error_and_an_update_is_not() {
    let mut message = bytes("a.");
    message.resize(MAX_QUERY + 1, 0);
    assert_eq!(refused(&message), (Refusal::Oversized, Some(ResponseCode::FormErr)));
    message[2] = 5 << 3;
    assert!(read(&message).is_ok());
}

#[test]
fn operations_without_a_use_are_not_implemented() {
    for operation in [1, 2, 3, 6, 15] {
        let mut message = bytes("a.");
        message[2] = operation << 3;
        assert_eq!(refused(&message), (Refusal::Operation, Some(ResponseCode::NotImp)), "{operation}");
    }
}

#[test]
fn an_unknown_version_of_edns_is_answered_with_ours() {
    let mut message = query("a.");
    let mut edns = Edns::new();
    edns.set_version(1);
    message.set_edns(edns);
    let (refusal, code) = refused(&message.to_vec().unwrap());
    // The code has two names (RFC 6895, 2.3): as an option's it is BADVERS.
    assert_eq!((refusal, code.map(u16::from)), (Refusal::EdnsVersion, Some(16)));
}

#[test]
fn an_answer_that_does_not_fit_is_cut_and_says_so() {
    let mut message = query("headless.shop.svc.cluster.local.").into_response();
    message.set_edns(Edns::new());
    for i in 0..3000 {
        let ip = Ipv6Addr::from(0xfd00 << 112 | i);
        message.add_answer(Record::from_rdata(message.queries[0].name().clone(), 30, RData::AAAA(AAAA(ip))));
    }
    for limit in [512, 1232, 4096, 65_535] {
        let cut = encode(&message, limit);
        // The longest record: the name in full, fixed fields, an address.
        let longest = message.queries[0].name().len() + 1 + 10 + 16;
        assert!(cut.len() <= limit && cut.len() + longest > limit, "{} of {limit}", cut.len());
        let cut = Message::from_vec(&cut).unwrap();
        assert!(cut.metadata.truncation && cut.edns.is_some());
    }
    message.answers.truncate(2);
    let whole = encode(&message, 512);
    assert!(!is_truncated(&whole));
    assert_eq!(Message::from_vec(&whole).unwrap().answers.len(), 2);
}

#[test]
fn a_reply_belongs_to_the_query_with_its_id_and_question() {
    let asked = bytes("a.example.");
    let question = read(&asked).unwrap().question;
    let mut reply = asked.clone();
    assert!(!is_answer(&reply, &asked, &question), "a query is no answer");
    reply[2] |= 0x80;
    assert!(is_answer(&reply, &asked, &question));
    reply[13] = b'A';
    assert!(is_answer(&reply, &asked, &question), "case may change");
    reply[13] = b'b';
    assert!(!is_answer(&reply, &asked, &question), "another name");
    reply[13] = b'a';
    reply[0] ^= 1;
    assert!(!is_answer(&reply, &asked, &question), "another id");
    reply[0] ^= 1;
    assert!(!is_answer(&reply[..20], &asked, &question), "cut off");
    let mut unread = reply[..12].to_vec();
    unread[4..6].fill(0);
    assert!(!is_answer(&unread, &asked, &question), "no question and no error");
    unread[3] |= 1;
    assert!(is_answer(&unread, &asked, &question), "format error without the question");
}

#[test]
fn a_reply_that_is_cut_keeps_its_question_and_says_so() {
    let asked = bytes("a.example.");
    let question = read(&asked).unwrap().question;
    let mut reply = asked;
    reply[2] |= 0x80;
    reply[6..12].fill(7);
    reply.extend([1; 600]);
    let short = cut(&reply, &question);
    let message = Message::from_vec(&short).unwrap();
    assert!(message.metadata.truncation);
    assert_eq!((message.queries.len(), message.answers.len()), (1, 0));
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        if let Err(refused) = read(&bytes)
            && let Some(reply) = refused.reply
        {
            prop_assert!(Message::from_vec(&reply).is_ok());
            // Two servers never talk to each other: a reply to a reply is dropped.
            prop_assert_eq!(read(&reply).unwrap_err().reply, None);
        }
    }

    #[test]
    fn no_damage_to_a_query_makes_the_reader_panic(
        name in "([a-z]{1,10}\\.){1,6}",
        at in any::<prop::sample::Index>(),
        value in any::<u8>(),
        tail in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut bytes = bytes(&name);
        let at = at.index(bytes.len());
        bytes[at] = value;
        bytes.extend(tail);
        if let Ok(query) = read(&bytes) {
            prop_assert!(query.question.end <= bytes.len());
            prop_assert_eq!(query.message.queries.len(), 1);
        }
    }

    #[test]
    fn no_reply_makes_the_matching_panic(
        reply in proptest::collection::vec(any::<u8>(), 0..100),
        end in 12_usize..200,
    ) {
        let query = bytes("a.example.");
        let short = cut(&reply, &(12..end));
        prop_assert!(short.len() <= reply.len());
        prop_assert!(short.len() < 12 || is_truncated(&short));
        prop_assert!(!is_answer(&reply, &query, &(12..end)) || reply[..2] == query[..2]);
    }
}
