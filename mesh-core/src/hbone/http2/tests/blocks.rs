//! Header blocks against the examples of RFC 7541 Appendix C, and against ourselves.

use proptest::prelude::*;

use super::super::hpack::{Decoder, Encoder, Malformed};
use super::super::huffman;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

fn decode(decoder: &mut Decoder, block: &[u8]) -> Result<Vec<(String, String)>, Malformed> {
    let mut fields = Vec::new();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    decoder.decode(block, |name, value| fields.push((text(name), text(value))))?;
    Ok(fields)
}

fn fields(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect()
}

#[test]
fn the_requests_of_the_rfc_are_read_with_and_without_huffman() {
    let plain = [
        "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
        "8286 84be 5808 6e6f 2d63 6163 6865",
        "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
    ];
    let huffman = [
        "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
        "8286 84be 5886 a8eb 1064 9cbf",
        "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
    ];
    for blocks in [plain, huffman] {
        let mut decoder = Decoder::default();
        let mut next = |n: usize| decode(&mut decoder, &hex(blocks[n])).unwrap();
        let get =
            [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "www.example.com")];
        assert_eq!(next(0), fields(&get));
        assert_eq!(next(1), fields(&[&get[..], &[("cache-control", "no-cache")]].concat()));
        let last = [
            (":method", "GET"),
            (":scheme", "https"),
            (":path", "/index.html"),
            (":authority", "www.example.com"),
            ("custom-key", "custom-value"),
        ];
        assert_eq!(next(2), fields(&last));
    }
}

#[test]
fn blocks_that_are_none_are_refused() {
    for block in [
        "80",                   // index 0
        "be",                   // an entry that is not there
        "ff ff ff ff ff ff 0f", // an index of more than 28 bits
        "40 05 61",             // a string that is cut off
        "82 3f e1 1f",          // a change of the table's size amid a block
        "3f e2 1f",             // a table of more than 4096 bytes
        "40 81 ff 01 61",       // Huffman: padding of a whole byte of ones
        "40 81 00 01 61",       // Huffman: padding of zeros
        "40 84 ff ff ff ff 00", // Huffman: the end of string
    ] {
        assert_eq!(decode(&mut Decoder::default(), &hex(block)), Err(Malformed), "{block}");
    }
}

#[test]
fn what_repeats_takes_one_byte_and_survives_eviction() {
    let (mut encoder, mut decoder) = (Encoder::default(), Decoder::default());
    for round in 0..200 {
        let authority = format!("10.0.0.{}:80", round % 100);
        let mut block = Vec::new();
        encoder.begin(&mut block);
        encoder.repeating(&mut block, ":method", b"CONNECT");
        encoder.repeating(&mut block, ":authority", authority.as_bytes());
        encoder.changing(&mut block, "forwarded", round.to_string().as_bytes());
        let expected =
            [(":method", "CONNECT"), (":authority", &authority), ("forwarded", &round.to_string())];
        assert_eq!(decode(&mut decoder, &block), Ok(fields(&expected)), "round {round}");
        if round == 0 {
            let mut again = Vec::new();
            encoder.repeating(&mut again, ":method", b"CONNECT");
            assert_eq!((again.len(), decode(&mut decoder, &again)), (1, Ok(fields(&expected[..1]))));
        }
    }
}

#[test]
fn a_peer_without_a_table_gets_none() {
    let mut encoder = Encoder::default();
    let mut block = Vec::new();
    encoder.repeating(&mut block, "baggage", b"a=b");
    encoder.set_table_size(0);
    block.clear();
    encoder.begin(&mut block);
    encoder.repeating(&mut block, "baggage", b"a=b");
    assert_eq!(block[0], 0x20, "the new size is said first");
    let mut decoder = Decoder::default();
    assert_eq!(decode(&mut decoder, &block), Ok(fields(&[("baggage", "a=b")])));
    assert_eq!(decode(&mut decoder, &[0xbe]), Err(Malformed), "nothing was kept");
}

proptest! {
    #[test]
    fn every_text_survives_the_huffman_code(text: Vec<u8>) {
        let mut decoded = Vec::new();
        huffman::decode(&huffman::encode(&text), &mut decoded, text.len()).unwrap();
        prop_assert_eq!(decoded, text);
    }

    #[test]
    fn no_bytes_make_the_decoder_panic_or_grow(blocks: Vec<Vec<u8>>) {
        let mut decoder = Decoder::default();
        for block in blocks {
            let mut size = 0;
            let ended = decoder.decode(&block, |name, value| size += name.len() + value.len());
            prop_assert!(size <= 5000 * (block.len() + 1));
            if ended.is_err() {
                break;
            }
        }
    }

    #[test]
    fn what_is_encoded_is_what_is_decoded(values in proptest::collection::vec("[ -~]{0,300}", 1..40)) {
        let (mut encoder, mut decoder) = (Encoder::default(), Decoder::default());
        for value in values {
            let mut block = Vec::new();
            encoder.begin(&mut block);
            encoder.status(&mut block, 503);
            encoder.repeating(&mut block, "baggage", value.as_bytes());
            encoder.changing(&mut block, "forwarded", value.as_bytes());
            let expected = fields(&[(":status", "503"), ("baggage", &value), ("forwarded", &value)]);
            prop_assert_eq!(decode(&mut decoder, &block), Ok(expected));
        }
    }
}
