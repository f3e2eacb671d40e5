//! Frames, cut anywhere.

use proptest::prelude::*;

use super::super::frame::{self, Head, Reason, head};
use super::super::parse::{Parser, Piece};

/// What a parser told, with data joined.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    Preface,
    Data(u32, Vec<u8>, usize),
    Frame(Head, Vec<u8>),
}

fn tell(parser: &mut Parser, bytes: &[u8], told: &mut Vec<Told>) -> Result<(), Reason> {
    let mut range = 0..bytes.len();
    while let Some(piece) = parser.next(bytes, &mut range)? {
        match piece {
            Piece::Preface => told.push(Told::Preface),
            Piece::DataBegins(head) => told.push(Told::Data(head.stream, Vec::new(), 0)),
            Piece::Data(at) => {
                let Some(Told::Data(_, data, _)) = told.last_mut() else { panic!("data without a frame") };
                data.extend_from_slice(&bytes[at]);
            }
            Piece::DataEnds(_) => {
                let Some(Told::Data(_, _, ends)) = told.last_mut() else { panic!("an end without a frame") };
                *ends += 1;
            }
            Piece::Frame(head) => told.push(Told::Frame(head, parser.payload().to_vec())),
        }
    }
    assert!(range.is_empty(), "bytes are left");
    Ok(())
}

fn one(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    [&head(payload.len(), kind, flags, stream)[..], payload].concat()
}

#[test]
fn padding_is_no_data_and_too_much_of_it_is_an_error() {
    let mut told = Vec::new();
    let mut parser = Parser::new(false, 1 << 14, 1 << 14);
    tell(&mut parser, &one(frame::DATA, frame::PADDED, 1, b"\x03abc\0\0\0"), &mut told).unwrap();
    tell(&mut parser, &one(frame::DATA, frame::PADDED, 3, b"\x00"), &mut told).unwrap();
    assert_eq!(told, [Told::Data(1, b"abc".to_vec(), 1), Told::Data(3, Vec::new(), 1)]);
    for payload in [&b"\x04abc"[..], b""] {
        let error = tell(&mut parser, &one(frame::DATA, frame::PADDED, 1, payload), &mut told);
        assert_eq!(error, Err(Reason::PROTOCOL_ERROR));
        parser = Parser::new(false, 1 << 14, 1 << 14);
    }
}

#[test]
fn a_frame_that_is_too_long_is_an_error_before_it_has_come() {
    let mut parser = Parser::new(false, 1 << 14, 100);
    let error = tell(&mut parser, &head((1 << 14) + 1, frame::DATA, 0, 1), &mut Vec::new());
    assert_eq!(error, Err(Reason::FRAME_SIZE_ERROR));
    let mut parser = Parser::new(false, 1 << 14, 100);
    let error = tell(&mut parser, &head(101, frame::HEADERS, 0, 1), &mut Vec::new());
    assert_eq!(error, Err(Reason::ENHANCE_YOUR_CALM));
}

proptest! {
    #[test]
    fn frames_are_the_same_however_they_are_cut(
        frames in proptest::collection::vec(
            (0u8..10, any::<bool>(), 0u32..9, proptest::collection::vec(any::<u8>(), 0..60)),
            0..20,
        ),
        cuts in proptest::collection::vec(1usize..40, 1..40),
    ) {
        let mut bytes = frame::PREFACE.to_vec();
        for (kind, flag, stream, payload) in &frames {
            bytes.extend(one(*kind, u8::from(*flag), *stream, payload));
        }
        let mut whole = Vec::new();
        tell(&mut Parser::new(true, 1 << 14, 1 << 14), &bytes, &mut whole).unwrap();
        let (mut cut, mut rest) = (Vec::new(), &bytes[..]);
        let mut parser = Parser::new(true, 1 << 14, 1 << 14);
        for n in cuts.iter().cycle() {
            let (now, later) = rest.split_at((*n).min(rest.len()));
            tell(&mut parser, now, &mut cut).unwrap();
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(whole, cut);
    }
}
