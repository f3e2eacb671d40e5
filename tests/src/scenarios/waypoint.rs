//! The product's own waypoint, with real clients before it and real servers behind it.

use super::programs::{need, nginx_conf};
use super::shop::{SHOP, enrolled};
use super::{Scenario, scenario};
use crate::bed::mesh::MeshOptions;
use crate::bed::{Testbed, Topology, Waypoint, process, wait};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("a service's waypoint carries its requests under its own identity", 90, identity),
    scenario("a VirtualService splits requests 80 to 20 between two versions", 90, canary),
    scenario("a header takes a request to another version than everybody's", 90, header),
    scenario("requests that a failing pod and a dead one get are answered by the others", 120, retries),
    scenario("a waypoint that is told to leave finishes its requests first", 90, drain),
];

pub(super) const SOON: Duration = Duration::from_secs(20);
const VIP: &str = "10.96.0.20";
const WP: &str = "shop/wp";

/// nginx as pod `shop/<name>` of version `name`, which says its name and the client's address, fails where it is asked to,
/// and takes its time.
pub(super) fn server(bed: &Testbed, name: &str, node: &str, failing: bool) -> Result<String> {
    let dir = bed.dir.join(format!("nginx-{name}"));
    let at = dir.display();
    let answer = if failing { "return 503" } else { "return 200" };
    let servers = format!(
        "log_format seen '$remote_addr $request_method $uri $status';
  server {{
    listen 8080; access_log {at}/seen seen;
    location / {{ {answer} '{name} $remote_addr\\n'; }}
    location /large {{ root {at}; }}
  }}"
    );
    let config = nginx_conf(&dir, &servers)?;
    let large = dir.join("large");
    std::fs::create_dir_all(&large).context("cannot make a directory")?;
    std::fs::write(large.join("file"), vec![b'x'; 8 << 20]).context("cannot write a file")?;
    let nginx = need("nginx")?;
    Ok(format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, labels: {{app: web, version: {name}}}}}
spec:
  nodeName: {node}
  serviceAccountName: backend
  containers:
  - name: main
    image: none
    command: [{}, -c, {}]
    ports: [{{containerPort: 8080}}]
---",
        nginx.display(),
        config.display()
    ))
}

/// The shop with Service `web` of these servers, bound to waypoint `wp`, and the mesh running.
pub(super) fn open(servers: impl FnOnce(&Testbed) -> Result<Vec<String>>) -> Result<Testbed> {
    let mut bed = Testbed::build(&Topology::nodes(&["a", "b"]), SHOP)?;
    bed.start_mesh(&MeshOptions::default())?;
    bed.deploy_waypoint(&Waypoint::of_shop("b"))?;
    let mut yaml = servers(&bed)?.join("\n");
    yaml.push_str(&format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: shop, labels: {{istio.io/use-waypoint: wp}}}}
spec:
  clusterIP: {VIP}
  clusterIPs: [{VIP}]
  selector: {{app: web}}
  ports: [{{name: http, port: 80, targetPort: 8080}}]
"
    ));
    bed.apply("web", &yaml)?;
    enrolled(&bed, &["shop/frontend", "shop/other", "shop/backend"])?;
    wait::until_true("answer through the waypoint", SOON, || {
        Ok(curl(&bed, "shop/frontend", &["-i", &url("/")])?.contains("x-envoy-upstream-service-time"))
    })?;
    Ok(bed)
}

pub(super) fn url(path: &str) -> String {
    format!("http://{VIP}{path}")
}

pub(super) fn curl(bed: &Testbed, from: &str, args: &[&str]) -> Result<String> {
    let argv = ["curl", "-sS", "--max-time", "30"].iter().chain(args).copied();
    let done = process::finish(&bed.pod(from)?.place, argv, Duration::from_secs(90))?;
    Ok(done.ok().with_context(|| format!("curl {}", args.join(" ")))?.to_owned())
}

/// Answers to so many requests, one a line.
fn many(bed: &Testbed, times: usize, args: &[&str]) -> Result<Vec<String>> {
    let urls = url(&format!("/[1-{times}]"));
    let out = curl(bed, "shop/frontend", &[args, &[&urls]].concat())?;
    Ok(out.lines().map(str::to_owned).collect())
}

/// Waits until a rule is in force: `holds` says so of an answer.
pub(super) fn in_force(bed: &Testbed, args: &[&str], holds: impl Fn(&str) -> bool) -> Result<()> {
    wait::until_true("rule in force", SOON, || {
        Ok(holds(&curl(bed, "shop/frontend", &[args, &[&url("/")]].concat())?))
    })
}

pub(super) const SUBSETS: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: web, namespace: shop}
spec:
  host: web
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
---";

pub(super) fn both(bed: &Testbed) -> Result<Vec<String>> {
    Ok(vec![server(bed, "v1", "a", false)?, server(bed, "v2", "b", false)?])
}

fn identity() -> Result<()> {
    let mut bed = open(|bed| Ok(vec![server(bed, "v1", "a", false)?]))?;
    // Who asks the server is the waypoint, by its address and by its identity.
    let policy = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-waypoint, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  action: ALLOW
  rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/wp]}}]}]
";
    bed.apply("policy", policy)?;
    let direct = format!("http://{}/", bed.pod("shop/v1")?.at(8080));
    wait::until_true("refusal of who does not come by the waypoint", SOON, || {
        Ok(curl(&bed, "shop/frontend", &[&direct]).is_err())
    })?;
    let waypoint = bed.pod(WP)?.v4;
    for (from, account) in [("shop/frontend", "frontend"), ("shop/other", "other")] {
        let said = curl(&bed, from, &[&url("/")])?;
        ensure!(said == format!("v1 {waypoint}\n"), "{said:?}");
        let principal = format!("source_principal=\"spiffe://cluster.local/ns/shop/sa/{account}\"");
        let labels = [
            "reporter=\"waypoint\"",
            "response_code=\"200\"",
            "destination_workload=\"v1\"",
            "destination_service=\"web.shop.svc.cluster.local\"",
            &principal,
        ];
        wait::until_true("request in the waypoint's metrics", SOON, || {
            Ok(bed.waypoint_metric(WP, "istio_requests_total", &labels)? >= 1.0)
        })?;
    }
    // A body of some size, both ways.
    let down =
        curl(&bed, "shop/frontend", &["-o", "/dev/null", "-w", "%{size_download}", &url("/large/file")])?;
    ensure!(down == (8 << 20).to_string(), "curl got {down} bytes");
    wait::until_true("line of the request in the waypoint's log", SOON, || {
        let log = bed.pod(WP)?.log();
        let is_it = |line: &str| line.contains("request complete") && line.contains("path=\"/large/file\"");
        Ok(log.lines().any(is_it))
    })?;
    // Past its waypoint, the policy stops the service's requests, too.
    bed.label("Service", "web", "istio.io/use-waypoint", None)?;
    wait::until_true("service without its waypoint", SOON, || {
        Ok(curl(&bed, "shop/frontend", &[&url("/")]).is_err())
    })
}

fn canary() -> Result<()> {
    let mut bed = open(both)?;
    let route = format!(
        "{SUBSETS}
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: web, namespace: shop}}
spec:
  hosts: [web]
  http:
  - route:
    - destination: {{host: web, subset: v1}}
      weight: 80
    - destination: {{host: web, subset: v2}}
      weight: 20
    headers: {{response: {{set: {{x-split: 'yes'}}}}}}
"
    );
    bed.apply("route", &route)?;
    in_force(&bed, &["-i"], |answer| answer.contains("x-split: yes"))?;
    let said = many(&bed, 1000, &[])?;
    let of = |version: &str| said.iter().filter(|line| line.starts_with(version)).count();
    ensure!(said.len() == 1000 && of("v1 ") + of("v2 ") == 1000, "{} answers", said.len());
    // Six standard deviations.
    ensure!((124..=276).contains(&of("v2 ")), "v2 got {} of 1000", of("v2 "));
    Ok(())
}

fn header() -> Result<()> {
    let mut bed = open(both)?;
    let route = format!(
        "{SUBSETS}
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: web, namespace: shop}}
spec:
  hosts: [web]
  http:
  - match: [{{headers: {{x-user: {{exact: tester}}}}}}]
    route: [{{destination: {{host: web, subset: v2}}}}]
  - route: [{{destination: {{host: web, subset: v1}}}}]
    headers: {{response: {{set: {{x-split: 'yes'}}}}}}
"
    );
    bed.apply("route", &route)?;
    in_force(&bed, &["-i"], |answer| answer.contains("x-split: yes"))?;
    for (args, version) in
        [(&["-H", "x-user: tester"][..], "v2 "), (&["-H", "x-user: testers"], "v1 "), (&[], "v1 ")]
    {
        let said = many(&bed, 50, args)?;
        ensure!(said.len() == 50 && said.iter().all(|line| line.starts_with(version)), "{args:?}: {said:?}");
    }
    Ok(())
}

fn retries() -> Result<()> {
    let mut bed = open(|bed| Ok(vec![server(bed, "v1", "a", false)?, server(bed, "v2", "b", true)?]))?;
    let route = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: shop}
spec:
  hosts: [web]
  http:
  - route: [{destination: {host: web}}]
    retries: {attempts: 3, retryOn: 'gateway-error,connect-failure,refused-stream'}
    headers: {response: {set: {x-split: 'yes'}}}
";
    bed.apply("route", route)?;
    in_force(&bed, &["-i"], |answer| answer.contains("x-split: yes"))?;
    let all_well = |bed: &Testbed| -> Result<()> {
        let codes = many(bed, 200, &["-o", "/dev/null", "-w", "%{http_code}\\n"])?;
        ensure!(codes.len() == 200 && codes.iter().all(|code| code == "200"), "{codes:?}");
        Ok(())
    };
    all_well(&bed)?;
    let seen = std::fs::read_to_string(bed.dir.join("nginx-v2/seen")).context("nginx's log")?;
    // Every other request begins there: a hundred, of which seven standard deviations leave fifty.
    let failed = seen.lines().filter(|line| line.ends_with(" 503")).count();
    ensure!(failed > 50, "the failing pod was asked {failed} times only");
    // It dies without being taken out of the service.
    bed.pods.get_mut("shop/v2").context("no pod v2")?.programs.iter_mut().for_each(process::Proc::kill);
    all_well(&bed)
}

fn drain() -> Result<()> {
    let mut bed = open(|bed| Ok(vec![server(bed, "v1", "a", false)?]))?;
    let mut client = bed.pod("shop/frontend")?.spawn([
        "curl",
        "-sS",
        "--limit-rate",
        "4M",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code} %{size_download}\n",
        &url("/large/file"),
    ])?;
    wait::until_true("download through the waypoint", SOON, || {
        let metrics = bed.at_waypoint(WP, 15_020, "/metrics")?;
        Ok(metrics.lines().any(|line| line == "undermesh_waypoint_streams_open 1"))
    })?;
    let waypoint = bed.pods.get_mut(WP).context("no waypoint")?;
    waypoint.programs[0].signal(rustix::process::Signal::TERM)?;
    let status = waypoint.programs[0].wait(SOON)?;
    ensure!(status.success(), "the waypoint ended with {status}");
    let ended = client.wait(SOON)?;
    ensure!(ended.success(), "curl ended with {ended}: {}", client.log());
    ensure!(client.log().trim() == format!("200 {}", 8 << 20), "{:?}", client.log());
    Ok(())
}
