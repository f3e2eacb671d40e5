//! What the cipher alone costs on this machine: no tunnel can be cheaper than its bytes sealed once and opened once.

use std::time::{Duration, Instant};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

/// The plaintext of a full TLS record.
const RECORD: usize = 16 << 10;
/// Long enough for the clock, short enough to be no load of its own.
const LONG_ENOUGH: Duration = Duration::from_millis(200);

/// Seconds for sealing and opening a gigabyte in full records.
pub(super) fn seconds_per_gigabyte() -> f64 {
    let key = UnboundKey::new(&AES_256_GCM, &[7; 32]).map(LessSafeKey::new);
    let Ok(key) = key else { return 0.0 };
    let mut record = vec![0; RECORD + AES_256_GCM.tag_len()];
    let nonce = || Nonce::assume_unique_for_key([1; 12]);
    let (began, mut bytes) = (Instant::now(), 0_u64);
    while began.elapsed() < LONG_ENOUGH {
        let (plain, tag) = record.split_at_mut(RECORD);
        let sealed = key.seal_in_place_separate_tag(nonce(), Aad::empty(), plain);
        let Ok(made) = sealed else { return 0.0 };
        tag.copy_from_slice(made.as_ref());
        if key.open_in_place(nonce(), Aad::empty(), &mut record).is_err() {
            return 0.0;
        }
        bytes += RECORD as u64;
    }
    began.elapsed().as_secs_f64() / bytes as f64 * 1e9
}
