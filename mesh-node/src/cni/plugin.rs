//! The plugin: environment and standard input as the CNI specification 1.0 says, one JSON document out.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::gate::without_agent;
use super::message::{Answer, LONGEST, Request, Starting, State};
use super::{RUN_DIR, SOCKET, STATE, STATE_DIR};

/// Versions of the specification that this understands.
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// Longer than an agent takes to say no.
const PATIENCE: Duration = Duration::from_secs(20);
/// Taking a pod's network down waits for nobody.
const DEL_PATIENCE: Duration = Duration::from_secs(1);

/// Codes of the specification.
const INVALID_ENVIRONMENT: u32 = 4;
const DECODE: u32 = 6;
const TRY_AGAIN_LATER: u32 = 11;

/// What the runtime passes on standard input.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Config {
    cni_version: String,
    run_dir: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    prev_result: Option<Value>,
}

/// Why a call fails.
#[derive(Debug, PartialEq, Eq)]
struct Failure {
    code: u32,
    message: String,
}

/// Runs as a plugin: reads environment and standard input, writes the result or the error to standard output.
#[must_use]
pub fn run() -> ExitCode {
    let mut input = String::new();
    let read = std::io::stdin().take(1 << 20).read_to_string(&mut input);
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let outcome = match read {
        Ok(_) => call(&variable, &input),
        Err(error) => Err(Failure { code: DECODE, message: format!("cannot read standard input: {error}") }),
    };
    let (document, code) = match outcome {
        Ok(document) => (document, ExitCode::SUCCESS),
        Err(failure) => (error(&failure, &input), ExitCode::FAILURE),
    };
    if let Some(document) = document
        && writeln!(std::io::stdout(), "{document}").is_err()
    {
        return ExitCode::FAILURE;
    }
    code
}

fn error(failure: &Failure, input: &str) -> Option<Value> {
    let config: Config = serde_json::from_str(input).unwrap_or_default();
    Some(json!({
        "cniVersion": version(&config),
        "code": failure.code,
        "msg": format!("undermesh: {}", failure.message),
    }))
}

fn version(config: &Config) -> &str {
    if config.cni_version.is_empty() { "1.0.0" } else { &config.cni_version }
}

/// One call; what to print.
fn call(variable: &dyn Fn(&str) -> String, input: &str) -> Result<Option<Value>, Failure> {
    let command = variable("CNI_COMMAND");
    if command == "VERSION" {
        return Ok(Some(json!({"cniVersion": "1.0.0", "supportedVersions": VERSIONS})));
    }
    let config: Config = serde_json::from_str(input).map_err(|e| Failure {
        code: DECODE,
        message: format!("the network configuration is no JSON: {e}"),
    })?;
    let run_dir = config.run_dir.clone().unwrap_or_else(|| PathBuf::from(RUN_DIR));
    let state_dir = config.state_dir.clone().unwrap_or_else(|| PathBuf::from(STATE_DIR));
    match command.as_str() {
        "ADD" => {
            add(&pod(variable), &run_dir, &state_dir)?;
            // A chained plugin passes the result of those before it on.
            Ok(Some(config.prev_result.clone().unwrap_or_else(|| json!({"cniVersion": version(&config)}))))
        }
        "DEL" => {
            let uid = pod(variable).uid;
            // An agent that is away has nothing to forget.
            let _ = ask(&run_dir, &Request::Del { uid }, DEL_PATIENCE);
            Ok(None)
        }
        // Whether capture is intact, the agent looks itself, and repairs it.
        "CHECK" | "GC" | "STATUS" => Ok(None),
        other => Err(Failure {
            code: INVALID_ENVIRONMENT,
            message: format!("CNI_COMMAND is {other:?}; ADD, DEL, CHECK and VERSION are known"),
        }),
    }
}

/// The pod of a call, from the arguments that Kubernetes' runtimes pass.
fn pod(variable: &dyn Fn(&str) -> String) -> Starting {
    let arguments = variable("CNI_ARGS");
    let argument = |name: &str| {
        let pairs = arguments.split(';').filter_map(|pair| pair.split_once('='));
        pairs.filter(|(key, _)| *key == name).map(|(_, value)| value.to_owned()).next().unwrap_or_default()
    };
    Starting {
        uid: argument("K8S_POD_UID"),
        namespace: argument("K8S_POD_NAMESPACE"),
        name: argument("K8S_POD_NAME"),
        netns: PathBuf::from(variable("CNI_NETNS")),
    }
}

/// Returns once the pod may go on.
fn add(pod: &Starting, run_dir: &Path, state_dir: &Path) -> Result<(), Failure> {
    // Not a pod of Kubernetes.
    if pod.namespace.is_empty() || pod.name.is_empty() {
        return Ok(());
    }
    let later = |message: String| Failure { code: TRY_AGAIN_LATER, message };
    match ask(run_dir, &Request::Add(pod.clone()), PATIENCE) {
        Ok(Answer { problem: None }) => Ok(()),
        Ok(Answer { problem: Some(problem) }) => {
            Err(later(format!("pod {}/{} is not captured yet: {problem}", pod.namespace, pod.name)))
        }
        Err(cause) if without_agent(pod, &state(state_dir)) => Err(later(format!(
            "pod {}/{} is of the mesh, and this node's agent does not answer ({cause}); it starts once an agent runs",
            pod.namespace, pod.name
        ))),
        Err(_) => Ok(()),
    }
}

/// A file that is missing or broken holds nobody.
fn state(state_dir: &Path) -> State {
    let bytes = std::fs::read(state_dir.join(STATE)).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

fn ask(run_dir: &Path, request: &Request, patience: Duration) -> std::io::Result<Answer> {
    let mut stream = UnixStream::connect(run_dir.join(SOCKET))?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream.take(LONGEST)).read_line(&mut answer)?;
    Ok(serde_json::from_str(&answer)?)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::os::unix::net::UnixListener;

    use super::*;

    /// What the runtime passes, with a run and state directory of the test's.
    fn input(directory: &Path) -> String {
        json!({
            "cniVersion": "1.0.0", "name": "n", "type": "undermesh-cni",
            "runDir": directory, "stateDir": directory,
            "prevResult": {"cniVersion": "1.0.0", "ips": [{"address": "10.1.2.3/24"}]},
        })
        .to_string()
    }

    fn environment(command: &str, namespace: &str) -> impl Fn(&str) -> String {
        let arguments =
            format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=cart;K8S_POD_UID=1");
        let known: HashMap<&str, String> = [
            ("CNI_COMMAND", command.to_owned()),
            ("CNI_NETNS", "/var/run/netns/cni-1".to_owned()),
            ("CNI_ARGS", arguments),
        ]
        .into();
        move |name| known.get(name).cloned().unwrap_or_default()
    }

    /// An agent that gives one answer; what it was asked is returned by the thread.
    fn agent(run_dir: &Path, answer: &'static str) -> std::thread::JoinHandle<Request> {
        let listener = UnixListener::bind(run_dir.join(SOCKET)).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            serde_json::from_str(&line).unwrap()
        })
    }

    fn write_state(run_dir: &Path) {
        std::fs::write(run_dir.join(STATE), r#"{"namespaces":["shop"],"failOpen":false}"#).unwrap();
    }

    #[test]
    fn a_pod_goes_on_with_the_result_of_the_plugins_before_once_the_agent_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let agent = agent(dir.path(), "{\"problem\":null}\n");
        let printed = call(&environment("ADD", "shop"), &input(dir.path())).unwrap().unwrap();
        assert_eq!(printed["ips"][0]["address"], "10.1.2.3/24");
        let Request::Add(asked) = agent.join().unwrap() else { panic!("an ADD") };
        assert_eq!((asked.uid.as_str(), asked.name.as_str()), ("1", "cart"));
        assert_eq!(asked.netns, Path::new("/var/run/netns/cni-1"));
    }

    #[test]
    fn a_pod_that_cannot_be_captured_fails_with_a_named_error_that_may_be_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let _agent = agent(dir.path(), "{\"problem\":\"no slot\"}\n");
        let failure = call(&environment("ADD", "shop"), &input(dir.path())).unwrap_err();
        assert_eq!(failure.code, TRY_AGAIN_LATER);
        assert!(failure.message.contains("shop/cart") && failure.message.contains("no slot"), "{failure:?}");
        let printed = error(&failure, &input(dir.path())).unwrap();
        assert_eq!((&printed["cniVersion"], &printed["code"]), (&json!("1.0.0"), &json!(11)));
    }

    #[test]
    fn with_no_agent_only_pods_of_the_mesh_wait() {
        let dir = tempfile::tempdir().unwrap();
        let add = |namespace: &str| call(&environment("ADD", namespace), &input(dir.path()));
        assert!(add("shop").is_ok(), "nothing is known");
        write_state(dir.path());
        assert!(add("shop").unwrap_err().message.contains("agent does not answer"));
        for namespace in ["plain", "kube-system", ""] {
            assert!(add(namespace).is_ok(), "{namespace}");
        }
        std::fs::write(dir.path().join(STATE), "{").unwrap();
        assert!(add("shop").is_ok(), "a broken file holds nobody");
    }

    #[test]
    fn taking_a_network_down_and_checking_never_fail() {
        let dir = tempfile::tempdir().unwrap();
        write_state(dir.path());
        for command in ["DEL", "CHECK"] {
            assert_eq!(call(&environment(command, "shop"), &input(dir.path())), Ok(None));
        }
        let version = call(&environment("VERSION", ""), "").unwrap().unwrap();
        assert_eq!(version["supportedVersions"][3], "1.0.0");
        assert_eq!(call(&environment("ADD", "shop"), "{").unwrap_err().code, DECODE);
        assert_eq!(call(&environment("FROB", "shop"), "{}").unwrap_err().code, INVALID_ENVIRONMENT);
    }
}
