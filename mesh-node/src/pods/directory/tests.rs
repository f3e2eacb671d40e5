use super::*;
use std::os::unix::fs::PermissionsExt;
use std::sync::mpsc;
use std::time::Duration;

const POD: &str = r#"{"uid":"u1","name":"cart","namespace":"shop","service_account":"cart",
    "netns":"/var/run/netns/cart","cgroup":"/sys/fs/cgroup/cart","probe_ports":[8080]}"#;

/// A source whose files belong to whoever runs the tests.
fn source(directory: &tempfile::TempDir) -> DirectorySource {
    let owner = fs::metadata(directory.path()).unwrap().uid();
    DirectorySource { path: directory.path().to_owned(), owner }
}

fn write(directory: &tempfile::TempDir, name: &str, text: &str) {
    let path = directory.path().join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
}

fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

#[test]
fn a_pod_is_read_with_its_probe_ports() {
    let directory = directory();
    write(&directory, "cart.json", POD);
    let snapshot = source(&directory).snapshot().unwrap();
    assert_eq!(snapshot.rejected, []);
    assert_eq!(snapshot.pods.len(), 1);
    assert_eq!(snapshot.pods[0].key().service_account, "cart");
    assert_eq!(snapshot.pods[0].probe_ports, [8080]);
}

#[test]
fn a_bad_file_is_named_and_the_others_still_count() {
    let directory = directory();
    write(&directory, "cart.json", POD);
    write(&directory, "broken.json", "{\"uid\":\"u2\",\n \"name\": 7}");
    write(&directory, "relative.json", &POD.replace("u1", "u3").replace("/var/run/netns", "netns"));
    write(&directory, "again.json", POD);
    write(&directory, "notes.txt", "not a pod");
    let snapshot = source(&directory).snapshot().unwrap();
    assert_eq!(snapshot.pods.len(), 1);
    let told = |file: &str| {
        let (_, problem) = snapshot.rejected.iter().find(|(name, _)| name == file).unwrap();
        problem.clone()
    };
    assert!(told("broken.json").contains("line 2"), "{}", told("broken.json"));
    assert!(told("relative.json").contains("`netns`"), "{}", told("relative.json"));
    assert!(told("cart.json").contains("uid `u1`"), "{}", told("cart.json"));
}

#[test]
fn a_file_that_others_can_write_is_refused() {
    let directory = directory();
    write(&directory, "cart.json", POD);
    fs::set_permissions(directory.path().join("cart.json"), fs::Permissions::from_mode(0o666)).unwrap();
    let snapshot = source(&directory).snapshot().unwrap();
    assert_eq!(snapshot.pods, []);
    assert!(snapshot.rejected[0].1.contains("0666"), "{:?}", snapshot.rejected);
}

#[test]
fn a_file_of_another_user_is_refused() {
    let directory = directory();
    write(&directory, "cart.json", POD);
    let snapshot = read(&directory.path().join("cart.json"), u32::MAX);
    assert!(snapshot.unwrap_err().contains("must belong to user"));
}

#[test]
fn a_link_is_refused_even_to_a_good_file() {
    let directory = directory();
    write(&directory, "cart.txt", POD);
    std::os::unix::fs::symlink(directory.path().join("cart.txt"), directory.path().join("cart.json"))
        .unwrap();
    let snapshot = source(&directory).snapshot().unwrap();
    assert_eq!(snapshot.rejected, [("cart.json".to_owned(), "not a regular file".to_owned())]);
}

#[test]
fn a_directory_that_others_can_write_or_that_is_missing_is_an_error_with_the_fix() {
    let directory = directory();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let error = source(&directory).snapshot().unwrap_err().to_string();
    assert!(error.contains("0777") && error.contains("0755"), "{error}");
    let missing = DirectorySource::new(directory.path().join("nothing"));
    assert!(missing.snapshot().unwrap_err().to_string().contains("create it"));
}

#[test]
fn a_new_file_is_noticed() {
    let directory = directory();
    let (told, hear) = mpsc::channel();
    let told = std::sync::Mutex::new(told);
    let guard = source(&directory)
        .watch(Arc::new(move || {
            let _ = told.lock().unwrap().send(());
        }))
        .unwrap();
    write(&directory, "cart.json", POD);
    hear.recv_timeout(Duration::from_secs(10)).unwrap();
    drop(guard);
}
