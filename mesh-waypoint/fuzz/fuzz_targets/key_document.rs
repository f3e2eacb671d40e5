//! What issuers publish. Input: a document. Keys are used or named as not usable, none is forgotten.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_waypoint::security::jwks::KeySet;

fuzz_target!(|document: &[u8]| {
    let Ok(keys) = KeySet::read(document) else { return };
    let document: serde_json::Value = serde_json::from_slice(document).expect("it was read");
    let all = document["keys"].as_array().expect("it was read").len();
    assert!(keys.skipped().len() < all, "a document without a key that can be used is refused");
});
