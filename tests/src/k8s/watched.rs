//! What a waypoint of real pods tells of requests, as Telemetry and the mesh's settings have it, and keys that it fetches.
//! nginx collects the spans and serves the keys.

use super::bed::SYSTEM;
use super::mesh::MODE;
use super::rules::{behind_waypoint, status};
use super::waypoints::{Forwarded, PATIENCE};
use super::{Bed, Scenario, Space, pods, scenario};
use crate::bed::tokens::Tokens;
use crate::bed::{run as this_run, wait};
use crate::cluster::node;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::path::Path;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("Telemetry decides what a waypoint of pods traces, logs and counts", 240, telemetry),
    scenario("what becomes of pods' connections is told to those who may read their logs", 240, flows),
    scenario(
        "a waypoint of pods fetches a token issuer's keys from a service, and anew once they change",
        240,
        keys,
    ),
];

/// nginx with these servers; `files` are in `/data`.
fn nginx(name: &str, node: &str, servers: &str, files: &[(&str, &str)]) -> String {
    let config = format!(
        "daemon off; pid /tmp/pid; error_log stderr; user root; events {{}}
http {{ access_log off; client_body_temp_path /tmp/b; proxy_temp_path /tmp/p; fastcgi_temp_path /tmp/f;
uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s; {servers} }}"
    );
    let mut data = json!({"nginx.conf": config});
    for (file, text) in files {
        data[file] = (*text).into();
    }
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data});
    let pod = pods::pod(name, node, &["nginx", "-e", "stderr", "-c", "/data/nginx.conf"]);
    format!(
        "---
{map}
{pod}    ports: [{{containerPort: 8080}}]
    readinessProbe: {{httpGet: {{path: /ready, port: 8080}}, periodSeconds: 1}}
    volumeMounts: [{{name: data, mountPath: /data}}]
  volumes: [{{name: data, configMap: {{name: {name}}}}}]
{}",
        pods::service(name)
    )
}

/// More of the mesh's settings; as they were once this is dropped.
struct Settings<'b> {
    bed: &'b Bed,
    before: String,
}

impl<'b> Settings<'b> {
    fn add(bed: &'b Bed, more: &str) -> Result<Self> {
        let args = ["--namespace", SYSTEM, "get", "configmap", "istio", "-o", "json"];
        let map: Value = serde_json::from_str(&bed.kubectl.run(&args)?)?;
        let before = map["data"]["mesh"].as_str().context("the mesh has no settings")?.to_owned();
        let settings = Self { bed, before };
        settings.set(&format!("{}\n{more}", settings.before.trim_end()))?;
        Ok(settings)
    }

    fn set(&self, mesh: &str) -> Result<()> {
        let patch = json!({"data": {"mesh": mesh}}).to_string();
        let args = ["--namespace", SYSTEM, "patch", "configmap", "istio", "--type=merge", "--patch", &patch];
        self.bed.kubectl.run(&args).map(|_| ())
    }
}

impl Drop for Settings<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.set(&self.before) {
            eprintln!("the mesh's settings are not as they were: {error:#}");
        }
    }
}

/// Bodies of what is posted, each a line of the log.
const COLLECTOR: &str = "log_format body escape=none '$request_body'; client_body_buffer_size 1m;
  client_body_in_single_buffer on;
  server { listen 8080; location = /ready { return 200; }
    location / { access_log /dev/stdout body; proxy_pass http://127.0.0.1:8081; } }
  server { listen 127.0.0.1:8081; location / { return 202; } }";

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

const TELEMETRY: &str = "---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: of-all}
spec:
  tracing: [{providers: [{name: um-spans}], randomSamplingPercentage: 0}]
  accessLogging: [{providers: [{name: um-lines}], filter: {expression: 'response.code >= 500'}}]
  metrics:
  - providers: [{name: prometheus}]
    overrides:
    - match: {metric: REQUEST_COUNT}
      tagOverrides: {asked_for: {value: 'request.url_path'}, source_principal: {operation: REMOVE}}
";

const FAILS: &str = "---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web}
spec:
  hosts: [web]
  http:
  - match: [{uri: {prefix: /fail}}]
    directResponse: {status: 503}
  - route: [{destination: {host: web}}]
";

fn telemetry(bed: &Bed) -> Result<()> {
    bed.layout()?;
    let b = &bed.nodes[1];
    let (web, collector) = (pods::web("web", b), nginx("collector", b, COLLECTOR, &[]));
    let objects = [&web, &pods::service("web"), &collector, FAILS, TELEMETRY].concat();
    let space = behind_waypoint(bed, &objects, &["web", "collector"])?;
    let more = format!(
        "extensionProviders:
- name: um-spans
  zipkin: {{service: collector.{}.svc.cluster.local, port: 80}}
- name: um-lines
  envoyFileAccessLog: {{path: /dev/stdout, logFormat: {{text: 'um-line %RESPONSE_CODE% %REQ(:PATH)%'}}}}",
        space.name()
    );
    let _settings = Settings::add(bed, &more)?;
    let waypoint = || space.kubectl(&["logs", "deployment/waypoint", "--tail=-1"]);
    wait::until_true("line of a failure", PATIENCE, || {
        ensure!(status(&space, "client", "http://web/fail/first", &[])? == "503", "no failure");
        Ok(waypoint()?.contains("um-line 503 /fail/first?n=1\n"))
    })?;
    ensure!(status(&space, "client", "http://web/well", &[])? == "200", "a request failed");
    ensure!(status(&space, "client", "http://web/fail/last", &[])? == "503", "no failure");
    wait::until_true("line of the last failure", PATIENCE, || {
        Ok(waypoint()?.contains("um-line 503 /fail/last?n=1\n"))
    })?;
    ensure!(!waypoint()?.contains("um-line 200"), "a request that was well has a line");

    // The client's own trace is continued; nobody else's begins.
    let parent = format!("traceparent: 00-{TRACE}-b7ad6b7169203331-01");
    let spans = || -> Result<Vec<Value>> {
        let log = space.kubectl(&["logs", "collector", "--tail=-1"])?;
        let batches = log.lines().filter(|line| line.starts_with('['));
        let batches: Vec<Vec<Value>> = batches.map(serde_json::from_str).collect::<Result<_, _>>()?;
        Ok(batches.concat())
    };
    wait::until_true("spans of a request", PATIENCE, || {
        ensure!(
            status(&space, "client", "http://web/traced", &["-H", &parent])? == "200",
            "a request failed"
        );
        let spans = spans()?;
        ensure!(spans.iter().all(|span| span["traceId"] == TRACE), "somebody's trace began: {spans:?}");
        Ok(["SERVER", "CLIENT"].iter().all(|kind| spans.iter().any(|span| span["kind"] == *kind)))
    })?;
    let spans = spans()?;
    let server = spans.iter().find(|span| span["kind"] == "SERVER").context("no span of the server")?;
    ensure!(server["parentId"] == "b7ad6b7169203331", "{server}");
    ensure!(server["tags"]["http.url"].as_str().is_some_and(|url| url.contains("/traced")), "{server}");

    let metrics = Forwarded::start(bed, space.name(), "deployment/waypoint", 15020)?;
    let url = format!("{}/metrics", metrics.url());
    let text = crate::bed::netns::command("curl", ["--silent", "--noproxy", "*", "--fail", &url])?;
    let of_well: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("istio_requests_total{") && line.contains("asked_for=\"/well\""))
        .collect();
    ensure!(of_well.len() == 1 && of_well[0].ends_with(" 1"), "{of_well:?}");
    ensure!(!of_well[0].contains("source_principal="), "a label that was taken away is there: {of_well:?}");
    Ok(())
}

/// Serves `/data/keys.json`.
const ISSUER: &str = "server { listen 8080; root /data; location = /ready { return 200; } \
                      location /keys.json { access_log /dev/stdout; default_type application/json; } }";

fn keys(bed: &Bed) -> Result<()> {
    let dir = this_run::dir_of(&this_run::next_name());
    let issued = (|| {
        let (old, new) = (dir.join("old"), dir.join("new"));
        for dir in [&old, &new] {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        Ok::<_, anyhow::Error>((Tokens::of_key(&old, "old")?, Tokens::of_key(&new, "new")?))
    })();
    std::fs::remove_dir_all(&dir)?;
    let (old, new) = issued?;
    let b = &bed.nodes[1];
    // Outside the mesh, as an issuer is.
    let outside = bed.space(&[(MODE, "none")])?;
    let serve = |keys: &str| outside.apply(&nginx("issuer", b, ISSUER, &[("keys.json", keys)]));
    serve(&old.keys)?;
    outside.wait_ready(&["issuer"])?;
    let rule = format!(
        "---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: issuer}}
spec:
  targetRefs: [{{group: '', kind: Service, name: web}}]
  jwtRules: [{{issuer: 'https://issuer.example', jwksUri: 'http://issuer.{}.svc.cluster.local/keys.json'}}]
",
        outside.name()
    );
    let objects = [pods::web("web", b), pods::service("web"), rule].concat();
    let space = behind_waypoint(bed, &objects, &["web"])?;
    let asked = |token: &str| {
        status(&space, "client", "http://web/", &["-H", &format!("authorization: Bearer {token}")])
    };
    wait::until_true("refusal of a token of another key", PATIENCE, || Ok(asked(&old.foreign)? == "401"))?;
    wait::until_true("the issuer's keys", PATIENCE, || Ok(asked(&old.good)? == "200"))?;
    for (what, token) in [("has expired", &old.expired), ("has a key that nobody serves", &new.good)] {
        ensure!(asked(token)? == "401", "a token that {what} holds");
    }
    let fetched = || -> Result<usize> {
        Ok(outside.kubectl(&["logs", "issuer", "--tail=-1"])?.matches("GET /keys.json").count())
    };
    ensure!(fetched()? >= 1, "nobody asked the issuer");
    // The kubelet brings the new file within its period of a minute and a half; a pod that is made again has it at once.
    outside.kubectl(&["delete", "pod", "issuer", "--wait"])?;
    serve(&new.keys)?;
    outside.wait_ready(&["issuer"])?;
    wait::until_true("the issuer's new keys", PATIENCE, || Ok(asked(&new.good)? == "200"))?;
    ensure!(asked(&old.good)? == "401", "a token of the key that is gone holds");
    // It goes: what is known holds.
    outside.kubectl(&["delete", "pod", "issuer", "--wait"])?;
    for _ in 0..3 {
        ensure!(asked(&new.good)? == "200" && asked(&old.good)? == "401", "the keys went with their server");
    }
    Ok(())
}

/// Jane may read the logs of this namespace, and nobody else's.
const JANE: &str = "---
apiVersion: v1
kind: ServiceAccount
metadata: {name: jane}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: stranger}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: logs}
rules: [{apiGroups: [''], resources: [pods/log], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: logs}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: logs}
subjects: [{kind: ServiceAccount, name: jane}]
";

fn flows(bed: &Bed) -> Result<()> {
    bed.layout()?;
    bed.mesh()?;
    let (a, b) = (&bed.nodes[0], &bed.nodes[1]);
    let space = bed.space(&[(MODE, "ambient")])?;
    space.apply(&[&pods::web("web", b), &pods::service("web"), &pods::client("client", a), JANE].concat())?;
    space.wait_ready(&["web", "client"])?;
    space.wait_captured(&["web", "client"], true)?;
    let dir = this_run::dir_of(&this_run::next_name());
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let told = told_to(bed, &space, &dir);
    std::fs::remove_dir_all(&dir)?;
    told
}

/// Runs a line of a shell on the node of the server.
fn on_node(bed: &Bed, shell: &str) -> Result<()> {
    let out = node::inside(bed.layout()?, &bed.nodes[1])?.args(["sh", "-c", shell]).output();
    let out = out.context("cannot run nsenter")?;
    ensure!(out.status.success(), "{shell}: {}", String::from_utf8_lossy(&out.stderr).trim());
    Ok(())
}

fn told_to(bed: &Bed, space: &Space<'_>, dir: &Path) -> Result<()> {
    let token = |account: &str| -> Result<String> {
        let file = dir.join(account);
        std::fs::write(&file, space.kubectl(&["create", "token", account])?)
            .context("cannot write a token")?;
        Ok(file.to_string_lossy().into_owned())
    };
    let (jane, stranger) = (token("jane")?, token("stranger")?);
    let control = Forwarded::start(bed, SYSTEM, "deployment/istiod", 15014)?;
    let (meshctl, url) = (bed.meshctl()?, control.url());
    let asked = |token: &str, more: &[&str]| {
        let args = [
            "flows",
            "--last",
            "1000",
            "-n",
            space.name(),
            "-o",
            "json",
            "--control",
            &url,
            "--token",
            token,
        ];
        meshctl.run(&[&args[..], more].concat())
    };
    let told = |what: &str, more: &[&str], wanted: &[(&str, &str)]| {
        wait::until_true(&format!("event of {what}"), PATIENCE, || {
            let said = asked(&jane, more)?;
            let events: Vec<Value> = said.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
            let is_it =
                |event: &Value| wanted.iter().all(|(at, value)| event.pointer(at) == Some(&(*value).into()));
            Ok(events.iter().any(is_it))
        })
    };
    let direct = space.server("web")?;
    space.curl("client", &format!("http://{direct}/"))?;
    let from = format!("{}/client", space.name());
    let tunnel = [("/destination/pod", "web"), ("/path", "tunnel")];
    told("a connection through the tunnel", &["--from", &from, "--kind", "closed"], &tunnel)?;
    // Nobody listens: the pod's kernel says so, and why.
    let nobody = format!("http://{}:81/", direct.ip());
    ensure!(space.curl("client", &nobody).is_err(), "somebody answered at {nobody}");
    told("the reset", &["--kind", "reset_sent"], &[("/reason", "NO_SOCKET"), ("/destination/pod", "web")])?;
    // The node drops packets on their way, as the rules of network policies do.
    on_node(
        bed,
        &format!(
            "nft 'table inet um_drop {{ chain c {{ type filter hook forward priority 0; ip daddr {} tcp dport 15008 drop; }}; }}'",
            direct.ip()
        ),
    )?;
    let got_through = space.curl("client", &format!("http://{direct}/"));
    let drop =
        told("the drop", &["--kind", "drop"], &[("/reason", "NETFILTER_DROP"), ("/destination/pod", "web")]);
    on_node(bed, "nft delete table inet um_drop")?;
    drop?;
    ensure!(got_through.is_err(), "the node dropped nothing");
    // What agents do for a connection is told with it, and is no connection of its own.
    let connects = asked(&jane, &["--kind", "connect"])?;
    let own = connects.lines().find(|line| line.contains("\"command\":\"um-"));
    ensure!(connects.contains("\"command\":\"curl\"") && own.is_none(), "{own:?} of {connects}");
    ensure!(connects.contains("\"container\":"), "no process has its container: {connects}");
    let refused = asked(&stranger, &[]);
    ensure!(refused.is_err(), "a stranger was told: {refused:?}");
    let agents =
        bed.kubectl.run(&["--namespace", SYSTEM, "logs", "daemonset/undermesh-node", "--tail=-1"])?;
    ensure!(!agents.contains("tracing is degraded"), "an agent lacks a hook: {agents}");
    Ok(())
}
