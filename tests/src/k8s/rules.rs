//! Istio's rules for requests on real pods: where they go, what comes when something fails, and who may ask what.

use super::mesh::MODE;
use super::waypoint::{GATEWAY, programmed};
use super::{Bed, Scenario, Space, pods, scenario};
use crate::bed::tokens::Tokens;
use crate::bed::{run as this_run, wait};
use anyhow::{Context, Result, ensure};
use std::time::{Duration, Instant};

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario(
        "a VirtualService splits requests of pods, takes some elsewhere, delays and ends others",
        240,
        traffic,
    ),
    scenario("pods that fail are made up for by others, and left out when they go on failing", 240, failures),
    scenario("tokens, identities and methods decide who may ask a pod what", 240, access),
];

const PATIENCE: Duration = Duration::from_secs(60);

/// A namespace whose services have a running waypoint, with some objects and a client on the first node.
pub(super) fn behind_waypoint<'b>(bed: &'b Bed, objects: &str, ready: &[&str]) -> Result<Space<'b>> {
    bed.mesh()?;
    let space = bed.space(&[(MODE, "ambient"), ("istio.io/use-waypoint", "waypoint")])?;
    space.apply(&[GATEWAY, objects, &pods::client("client", &bed.nodes[0])].concat())?;
    space.wait_ready(&[&["client"], ready].concat())?;
    programmed(&space)?;
    Ok(space)
}

/// A pod of a service and a version of it.
fn version(service: &str, version: &str, node: &str) -> String {
    let name = format!("{service}-{version}");
    pods::web(&name, node).replace(&format!("app: {name}"), &format!("app: {service}, version: {version}"))
}

/// Statuses that a pod gets, in order, for requests one after the other.
fn statuses(space: &Space<'_>, pod: &str, count: usize, url: &str, more: &[&str]) -> Result<Vec<String>> {
    let url = format!("{url}?n=[1-{count}]");
    let argv = ["curl", "--silent", "--max-time", "30", "-o", "/dev/null", "-w", "%{http_code}\n", &url];
    let said = space.exec(pod, &[&argv[..], more].concat())?;
    Ok(said.lines().map(str::to_owned).collect())
}

pub(super) fn status(space: &Space<'_>, pod: &str, url: &str, more: &[&str]) -> Result<String> {
    statuses(space, pod, 1, url, more)?.pop().context("curl said nothing")
}

/// The split and the header match as Istio's own examples have them, and what needs no pod.
const TRAFFIC: &str = "
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews}
spec:
  host: reviews
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews}
spec:
  hosts: [reviews]
  http:
  - match: [{headers: {end-user: {exact: jason}}}]
    route: [{destination: {host: reviews, subset: v2}}]
  - match: [{uri: {prefix: /slow}}]
    fault: {delay: {fixedDelay: 1s, percentage: {value: 100}}}
    route: [{destination: {host: reviews, subset: v1}}]
  - match: [{uri: {prefix: /teapot}}]
    fault: {abort: {httpStatus: 418, percentage: {value: 100}}}
    route: [{destination: {host: reviews, subset: v1}}]
  - match: [{uri: {exact: /moved}}]
    redirect: {uri: /here, redirectCode: 302}
  - match: [{uri: {exact: /closed}}]
    directResponse: {status: 503, body: {string: 'closed for today'}}
  - match: [{uri: {prefix: /shared}}]
    corsPolicy: {allowOrigins: [{exact: 'https://shop.example'}], allowMethods: [GET], maxAge: 1m}
    route: [{destination: {host: reviews, subset: v1}}]
  - match: [{uri: {regex: '/v[0-9]+/.*'}}]
    rewrite: {uriRegexRewrite: {match: '^/v[0-9]+/(.*)', rewrite: '/\\1'}}
    route: [{destination: {host: reviews, subset: v1}}]
  - match: [{uri: {prefix: /copied}}]
    route: [{destination: {host: reviews, subset: v1}}]
    mirrors: [{destination: {host: mirror}, percentage: {value: 100}}]
  - route:
    - {destination: {host: reviews, subset: v1}, weight: 80}
    - {destination: {host: reviews, subset: v2}, weight: 20}
";

/// A server that prints the paths that it is asked for.
fn printing(name: &str, node: &str) -> String {
    let config = "daemon off; pid /tmp/pid; error_log /dev/stderr; events {} http { log_format path $request_uri; \
                  access_log /dev/stdout path; server { listen 8080; listen [::]:8080; return 200; } }";
    let shell = format!("echo '{config}' > /tmp/conf; exec nginx -c /tmp/conf");
    pods::pod(name, node, &["sh", "-c", &shell])
}

fn traffic(bed: &Bed) -> Result<()> {
    let (a, b) = (&bed.nodes[0], &bed.nodes[1]);
    let versions = version("reviews", "v1", a) + &version("reviews", "v2", b);
    let mirror = printing("mirror", a) + &pods::service("mirror");
    let objects = [TRAFFIC, &versions, &pods::service("reviews"), &mirror];
    let space = behind_waypoint(bed, &objects.concat(), &["reviews-v1", "reviews-v2", "mirror"])?;
    let answers = |count: usize, more: &[&str]| -> Result<Vec<String>> {
        let url = format!("http://reviews/?n=[1-{count}]");
        let said = space.exec("client", &[&["curl", "--silent", "--max-time", "30", &url], more].concat())?;
        Ok(said.lines().map(str::to_owned).collect())
    };
    wait::until_true("rules in force", PATIENCE, || {
        Ok(status(&space, "client", "http://reviews/teapot", &[]).is_ok_and(|status| status == "418"))
    })?;
    let of = |answers: &[String], version: &str| answers.iter().filter(|one| one.contains(version)).count();
    let all = answers(300, &[])?;
    let (first, second) = (of(&all, "reviews-v1"), of(&all, "reviews-v2"));
    ensure!(first + second == 300, "of 300 requests {first} and {second} were answered");
    // Seven standard deviations of 300 fair draws on each side of 240.
    ensure!(
        (191..=289).contains(&first),
        "of 300 requests {first} went to the version that is to get four fifths"
    );
    let jason = answers(20, &["-H", "end-user: jason"])?;
    ensure!(of(&jason, "reviews-v2") == 20, "the header's requests went elsewhere: {jason:?}");
    let began = Instant::now();
    ensure!(
        status(&space, "client", "http://reviews/slow", &[])? == "200",
        "the delayed request has no answer"
    );
    ensure!(began.elapsed() >= Duration::from_secs(1), "the request was not delayed: {:?}", began.elapsed());
    let moved = space.exec(
        "client",
        &["curl", "--silent", "-w", "%{http_code} %{redirect_url}", "http://reviews/moved"],
    )?;
    ensure!(moved.ends_with("302 http://reviews/here"), "the redirect is {moved}");
    more_traffic(&space)
}

/// What needs no version of the service, and a copy of requests.
fn more_traffic(space: &Space<'_>) -> Result<()> {
    let ask =
        |more: &[&str]| space.exec("client", &[&["curl", "--silent", "--max-time", "5"], more].concat());
    let closed = ask(&["-w", " %{http_code}", "http://reviews/closed"])?;
    ensure!(closed == "closed for today 503", "the direct answer is {closed}");
    let answer = ask(&["http://reviews/v7/books"])?;
    ensure!(answer.contains("/books") && !answer.contains("/v7"), "the path was not rewritten: {answer}");
    let preflight = |origin: &str| {
        let origin = format!("origin: {origin}");
        let method = "access-control-request-method: GET";
        ask(&["-i", "-X", "OPTIONS", "-H", method, "-H", &origin, "http://reviews/shared"])
    };
    let allowed =
        |head: &str| head.to_lowercase().contains("access-control-allow-origin: https://shop.example");
    let (own, foreign) = (preflight("https://shop.example")?, preflight("https://other.example")?);
    ensure!(allowed(&own) && !allowed(&foreign), "CORS answers {own} and {foreign}");
    let before = space.kubectl(&["logs", "mirror"])?;
    ensure!(!before.contains("/copied"), "the mirror was asked before: {before}");
    let answer = ask(&["http://reviews/copied/1"])?;
    ensure!(answer.contains("reviews-v1"), "the copied request was answered by another: {answer}");
    wait::until_true("copy of the request", PATIENCE, || {
        Ok(space.kubectl(&["logs", "mirror"])?.contains("/copied/1"))
    })
}

const RETRIES: &str = "
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: flaky}
spec:
  hosts: [flaky]
  http:
  - match: [{uri: {prefix: /retried}}]
    retries: {attempts: 3, perTryTimeout: 2s, retryOn: 'gateway-error,connect-failure,refused-stream'}
    route: [{destination: {host: flaky}}]
  - retries: {attempts: 0}
    route: [{destination: {host: flaky}}]
";

const OUTLIERS: &str = "
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: flaky}
spec:
  host: flaky
  trafficPolicy:
    outlierDetection: {consecutive5xxErrors: 3, interval: 1s, baseEjectionTime: 300s, maxEjectionPercent: 100}
";

fn failures(bed: &Bed) -> Result<()> {
    let (a, b) = (&bed.nodes[0], &bed.nodes[1]);
    // It asks nobody for each answer, and says 502.
    let bad = ["mesh-tests", "tool", "web", "--name", "bad", "--port", pods::PORT, "--ask", "127.0.0.1:1"];
    let bad = pods::pod("flaky-bad", a, &bad).replace("app: flaky-bad", "app: flaky, version: bad");
    let objects = [RETRIES, &bad, &version("flaky", "good", b), &pods::service("flaky")];
    let space = behind_waypoint(bed, &objects.concat(), &["flaky-bad", "flaky-good"])?;
    let count = |url: &str, wanted: &str| -> Result<usize> {
        Ok(statuses(&space, "client", 40, url, &[])?.iter().filter(|status| *status == wanted).count())
    };
    wait::until_true("both pods behind the waypoint", PATIENCE, || {
        let (good, bad) = (count("http://flaky/", "200")?, count("http://flaky/", "502")?);
        Ok(good >= 5 && bad >= 5)
    })?;
    for _ in 0..3 {
        let good = count("http://flaky/retried", "200")?;
        ensure!(good == 40, "of 40 requests that are tried again {good} were answered");
    }
    space.apply(OUTLIERS)?;
    wait::until_true("the failing pod left out", PATIENCE, || Ok(count("http://flaky/", "200")? == 40))?;
    let good = count("http://flaky/", "200")?;
    ensure!(good == 40, "of 40 requests {good} were answered while the failing pod is left out");
    Ok(())
}

fn rules(space: &str, keys: &str) -> String {
    format!(
        "
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: frontend}}
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: tokens}}
spec:
  targetRefs: [{{group: '', kind: Service, name: backend}}]
  jwtRules: [{{issuer: 'https://issuer.example', jwks: '{keys}'}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: backend}}
spec:
  targetRefs: [{{group: '', kind: Service, name: backend}}]
  rules:
  - from: [{{source: {{principals: [cluster.local/ns/{space}/sa/frontend]}}}}]
    to: [{{operation: {{methods: [GET], paths: [/open/*]}}}}]
  - from: [{{source: {{requestPrincipals: ['https://issuer.example/*']}}}}]
    to: [{{operation: {{paths: [/members]}}}}]
  - to: [{{operation: {{paths: [/admins]}}}}]
    when: [{{key: 'request.auth.claims[role]', values: [admin]}}]
"
    )
}

fn access(bed: &Bed) -> Result<()> {
    let dir = this_run::dir_of(&this_run::next_name());
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let tokens = Tokens::issue(&dir);
    std::fs::remove_dir_all(&dir)?;
    let tokens = tokens?;
    let (a, b) = (&bed.nodes[0], &bed.nodes[1]);
    let frontend = pods::client("frontend", a).replace("spec:\n", "spec:\n  serviceAccountName: frontend\n");
    let objects = [pods::web("backend", b), pods::service("backend")].concat();
    let space = behind_waypoint(bed, &objects, &["backend"])?;
    space.apply(&(rules(space.name(), &tokens.keys) + &frontend))?;
    space.wait_ready(&["frontend"])?;
    let asked = |pod: &str, method: &str, path: &str, token: Option<&str>| {
        let header = token.map(|token| format!("authorization: Bearer {token}"));
        let mut more = vec!["-X", method];
        more.extend(header.iter().flat_map(|header| ["-H", header.as_str()]));
        status(&space, pod, &format!("http://backend{path}"), &more)
    };
    wait::until_true("policies in force", PATIENCE, || {
        Ok(asked("client", "GET", "/open/x", None)? == "403"
            && asked("frontend", "GET", "/open/x", None)? == "200")
    })?;
    let (good, guest) = (Some(tokens.good.as_str()), Some(tokens.guest.as_str()));
    for (pod, method, path, token, wanted) in [
        ("frontend", "POST", "/open/x", None, "403"),
        ("frontend", "GET", "/other", None, "403"),
        ("client", "GET", "/members", None, "403"),
        ("client", "GET", "/members", guest, "200"),
        ("client", "GET", "/members", Some(tokens.expired.as_str()), "401"),
        ("client", "GET", "/members", Some(tokens.foreign.as_str()), "401"),
        ("client", "GET", "/admins", guest, "403"),
        ("client", "GET", "/admins", good, "200"),
    ] {
        let got = asked(pod, method, path, token)?;
        ensure!(
            got == wanted,
            "{pod}, {method} {path}, token {}: {got} instead of {wanted}",
            token.is_some()
        );
    }
    Ok(())
}
