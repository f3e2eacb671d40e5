//! Paths of requests. Input: one path. Whatever it is, its normal form is that of itself, has nothing left that a server
//! would resolve, and has no escape that was not there.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_core::xds::proto::l7::settings::PathNormalization::{
    Base, DecodeAndMergeSlashes, MergeSlashes, None,
};
use mesh_waypoint::security::path::normalize;

fuzz_target!(|path: &str| {
    assert_eq!(normalize(path, None).as_deref(), Ok(path));
    for how in [Base, MergeSlashes, DecodeAndMergeSlashes] {
        let Ok(normal) = normalize(path, how) else { continue };
        assert_eq!(normalize(&normal, how).as_deref(), Ok(&*normal), "{path:?} under {how:?}");
        assert!(
            normal.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'\\' | b'#' | b'"')),
            "{normal:?}"
        );
        if normal == "*" {
            continue;
        }
        assert!(normal.starts_with('/'), "{normal:?}");
        let lower = normal.to_ascii_lowercase();
        assert!(!lower.contains("%2e") && !lower.contains("%00"), "{normal:?}");
        assert!(normal.split('/').all(|segment| segment != "." && segment != ".."), "{normal:?}");
        if how != Base {
            assert!(!normal.contains("//"), "{normal:?}");
        }
        if how == DecodeAndMergeSlashes {
            assert!(!lower.contains("%2f") && !lower.contains("%5c"), "{normal:?}");
        }
    }
});
