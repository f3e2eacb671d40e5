use mesh_core::xds::proto::l7::settings::PathNormalization;
use proptest::prelude::*;

use super::*;

const BASE: PathNormalization = PathNormalization::Base;
const NONE: PathNormalization = PathNormalization::None;
const MERGE: PathNormalization = PathNormalization::MergeSlashes;
const DECODE: PathNormalization = PathNormalization::DecodeAndMergeSlashes;

/// What a path becomes under BASE, MERGE_SLASHES, DECODE_AND_MERGE_SLASHES.
const CORPUS: &[(&str, &str, &str, &str)] = &[
    ("/", "/", "/", "/"),
    ("/admin", "/admin", "/admin", "/admin"),
    ("/admin/", "/admin/", "/admin/", "/admin/"),
    // Case is a matter of the application.
    ("/ADMIN", "/ADMIN", "/ADMIN", "/ADMIN"),
    // Dot segments.
    ("/./admin", "/admin", "/admin", "/admin"),
    ("/x/../admin", "/admin", "/admin", "/admin"),
    ("/../../admin", "/admin", "/admin", "/admin"),
    ("/admin/.", "/admin/", "/admin/", "/admin/"),
    ("/admin/x/..", "/admin/", "/admin/", "/admin/"),
    ("/..", "/", "/", "/"),
    ("/.", "/", "/", "/"),
    ("/a/b/../../../../c", "/c", "/c", "/c"),
    // Names that only look like dot segments.
    ("/...", "/...", "/...", "/..."),
    ("/.well-known/x", "/.well-known/x", "/.well-known/x", "/.well-known/x"),
    ("/a/..b", "/a/..b", "/a/..b", "/a/..b"),
    ("/a/b..", "/a/b..", "/a/b..", "/a/b.."),
    ("/x/..;/admin", "/x/..;/admin", "/x/..;/admin", "/x/..;/admin"),
    // Escaped dots.
    ("/x/%2e%2e/admin", "/admin", "/admin", "/admin"),
    ("/x/%2E%2E/admin", "/admin", "/admin", "/admin"),
    ("/x/.%2e/admin", "/admin", "/admin", "/admin"),
    ("/%2e/admin", "/admin", "/admin", "/admin"),
    ("/x/%2e%2e", "/", "/", "/"),
    // Escapes are undone once only.
    ("/x/%252e%252e/admin", "/x/%252e%252e/admin", "/x/%252e%252e/admin", "/x/%252e%252e/admin"),
    ("/%2561dmin", "/%2561dmin", "/%2561dmin", "/%2561dmin"),
    ("/a%252fb", "/a%252fb", "/a%252fb", "/a%252fb"),
    // Escaped unreserved characters.
    ("/%61dmin", "/admin", "/admin", "/admin"),
    ("/%41DMIN", "/ADMIN", "/ADMIN", "/ADMIN"),
    ("/adm%69n%2d%5F%7e", "/admin-_~", "/admin-_~", "/admin-_~"),
    // Other escapes stay as they are.
    ("/a%3Fb%23c", "/a%3Fb%23c", "/a%3Fb%23c", "/a%3Fb%23c"),
    ("/a%3fb", "/a%3fb", "/a%3fb", "/a%3fb"),
    ("/a%20b", "/a%20b", "/a%20b", "/a%20b"),
    ("/caf%C3%A9", "/caf%C3%A9", "/caf%C3%A9", "/caf%C3%A9"),
    ("/%", "/%", "/%", "/%"),
    ("/%4", "/%4", "/%4", "/%4"),
    ("/%zz", "/%zz", "/%zz", "/%zz"),
    // Characters that have to be escaped.
    ("/caf\u{e9}", "/caf%C3%A9", "/caf%C3%A9", "/caf%C3%A9"),
    ("/a b", "/a%20b", "/a%20b", "/a%20b"),
    (
        "/a\"<>`{|}^b",
        "/a%22%3C%3E%60%7B%7C%7D%5Eb",
        "/a%22%3C%3E%60%7B%7C%7D%5Eb",
        "/a%22%3C%3E%60%7B%7C%7D%5Eb",
    ),
    ("/a\tb\u{7f}", "/a%09b%7F", "/a%09b%7F", "/a%09b%7F"),
    // Backslashes.
    ("/x\\admin", "/x/admin", "/x/admin", "/x/admin"),
    ("/x\\..\\admin", "/admin", "/admin", "/admin"),
    ("/\\admin", "//admin", "/admin", "/admin"),
    ("/x/..\\admin", "/admin", "/admin", "/admin"),
    // Several slashes.
    ("//admin", "//admin", "/admin", "/admin"),
    ("/x//admin", "/x//admin", "/x/admin", "/x/admin"),
    ("/admin//", "/admin//", "/admin/", "/admin/"),
    ("///", "///", "/", "/"),
    ("/a//../b", "/a/b", "/a/b", "/a/b"),
    ("//../b", "/b", "/b", "/b"),
    ("/.//b", "//b", "/b", "/b"),
    // Escaped slashes.
    ("/x%2Fadmin", "/x%2Fadmin", "/x%2Fadmin", "/x/admin"),
    ("/x%2fadmin", "/x%2fadmin", "/x%2fadmin", "/x/admin"),
    ("/x%5Cadmin", "/x%5Cadmin", "/x%5Cadmin", "/x/admin"),
    ("/x%5cadmin", "/x%5cadmin", "/x%5cadmin", "/x/admin"),
    ("/x/..%2Fadmin", "/x/..%2Fadmin", "/x/..%2Fadmin", "/admin"),
    ("/x/%2e%2e%2fadmin", "/x/..%2fadmin", "/x/..%2fadmin", "/admin"),
    ("/x%5c..%5cadmin", "/x%5c..%5cadmin", "/x%5c..%5cadmin", "/admin"),
    ("/%2Fadmin", "/%2Fadmin", "/%2Fadmin", "/admin"),
    ("/x%2F%2F..%2Fadmin", "/x%2F%2F..%2Fadmin", "/x%2F%2F..%2Fadmin", "/x/admin"),
    ("/admin%2F", "/admin%2F", "/admin%2F", "/admin/"),
];

#[test]
fn every_way_of_writing_a_path_has_the_form_that_istio_defines() {
    for (path, base, merge, decode) in CORPUS {
        for (how, expected) in [(BASE, base), (MERGE, merge), (DECODE, decode)] {
            assert_eq!(normalize(path, how).as_deref(), Ok(*expected), "{path:?} under {how:?}");
        }
        assert_eq!(normalize(path, NONE).as_deref(), Ok(*path));
    }
}

#[test]
fn a_path_without_a_normal_form_is_refused() {
    let cases = [
        ("/a%00b", NotNormal::Nul),
        ("/a\0b", NotNormal::Nul),
        ("/admin#x", NotNormal::Fragment),
        ("/#", NotNormal::Fragment),
        ("", NotNormal::NotAbsolute),
        ("admin", NotNormal::NotAbsolute),
        ("%2Fadmin", NotNormal::NotAbsolute),
        ("\\admin", NotNormal::NotAbsolute),
        ("/x/%%32%65%%32%65/admin", NotNormal::Ambiguous),
        ("/%2%35%32e%2e/admin", NotNormal::Ambiguous),
    ];
    for (path, error) in cases {
        for how in [BASE, MERGE, DECODE] {
            assert_eq!(normalize(path, how), Err(error), "{path:?} under {how:?}");
        }
    }
    assert_eq!(normalize("*", BASE).as_deref(), Ok("*"), "OPTIONS of the server");
}

#[test]
fn a_normal_path_is_not_copied() {
    for path in ["/", "/shop/cart/42.json", "/a-b_c~d/e.f", "/shop.Cart/AddItem"] {
        for how in [BASE, MERGE, DECODE] {
            assert!(matches!(normalize(path, how), Ok(Cow::Borrowed(_))), "{path:?} under {how:?}");
        }
    }
}

#[test]
fn escapes_are_compared_whatever_their_case() {
    let cases = [
        ("/a%2fb", "/a%2Fb"),
        ("/a%2Fb", "/a%2Fb"),
        ("/%e2%82%acx", "/%E2%82%ACx"),
        ("/a%b", "/a%b"),
        ("/%zaz", "/%zaz"),
    ];
    for (path, equal) in cases {
        assert_eq!(with_equal_escapes(path), equal);
    }
}

fn paths() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just("/"),
        Just("."),
        Just(".."),
        Just("%2e"),
        Just("%2E"),
        Just("%2f"),
        Just("%2F"),
        Just("%5c"),
        Just("%5C"),
        Just("\\"),
        Just("%"),
        Just("%25"),
        Just("a"),
        Just("admin"),
        Just("%61"),
        Just(";"),
        Just("é"),
        Just(" "),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| format!("/{}", pieces.concat()))
}

proptest! {
    #[test]
    fn a_normal_path_has_no_dot_segments_and_only_plain_characters(path in paths()) {
        for how in [BASE, MERGE, DECODE] {
            let Ok(normal) = normalize(&path, how) else {
                // Only a % that escapes nothing makes a path ambiguous.
                prop_assert!(path.match_indices('%').any(|(i, _)| escaped(&path.as_bytes()[i..]).is_none()));
                continue;
            };
            let again = normalize(&normal, how);
            prop_assert_eq!(again.as_deref(), Ok(&*normal));
            prop_assert!(normal.starts_with('/'));
            prop_assert!(!normal.contains('\\'));
            prop_assert!(normal.split('/').all(|segment| segment != "." && segment != ".."), "{normal}");
            prop_assert!(normal.bytes().all(|b| is_plain(b) || b == b'%'), "{normal}");
            if how != BASE {
                prop_assert!(!normal.contains("//"), "{normal}");
            }
        }
    }

    #[test]
    fn spelling_a_segment_with_escapes_changes_nothing(name in "[a-zA-Z0-9._~-]{1,8}", upper: bool) {
        let escape = |b: u8| if upper { format!("%{b:02X}") } else { format!("%{b:02x}") };
        let spelled: String = name.bytes().map(escape).collect();
        for how in [BASE, MERGE, DECODE] {
            let (plain, spelled) = (format!("/x/{name}"), format!("/x/{spelled}"));
            prop_assert_eq!(normalize(&plain, how), normalize(&spelled, how));
        }
    }
}
