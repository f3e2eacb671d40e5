//! What routes and policies do at the product's own waypoint, as curl and wrk see it.

use super::programs::need;
use super::shop::enrolled;
use super::waypoint::{SOON, SUBSETS, both, curl, in_force, open, server, url};
use super::{Scenario, scenario};
use crate::bed::tokens::Tokens;
use crate::bed::{Testbed, wait};
use anyhow::{Result, ensure};
use std::time::{Duration, Instant};

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("an HTTPRoute sends paths and headers where it says, before any VirtualService", 90, http_route),
    scenario("faults, redirects, direct answers and CORS are what the VirtualService says", 90, actions),
    scenario(
        "tokens, identities, methods and paths decide at a waypoint, however a path is written",
        90,
        access,
    ),
    scenario("a thousand changes of routes under load fail no request", 120, changes),
    scenario("rules and hosts are there for the namespaces that they are exported to", 90, exported),
];

/// The status that curl gets.
fn status(bed: &Testbed, from: &str, args: &[&str]) -> Result<String> {
    curl(bed, from, &[&["-o", "/dev/null", "-w", "%{http_code}"], args].concat())
}

fn from_frontend(bed: &Testbed, args: &[&str]) -> Result<String> {
    status(bed, "shop/frontend", args)
}

fn http_route() -> Result<()> {
    let mut bed = open(both)?;
    let service = |version: &str, ip: &str| {
        format!(
            "
apiVersion: v1
kind: Service
metadata: {{name: web-{version}, namespace: shop}}
spec:
  clusterIP: {ip}
  clusterIPs: [{ip}]
  selector: {{app: web, version: {version}}}
  ports: [{{name: http, port: 80, targetPort: 8080}}]
---"
        )
    };
    let routes = format!(
        "{}{}
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: web, namespace: shop}}
spec:
  parentRefs: [{{group: '', kind: Service, name: web, port: 80}}]
  rules:
  - matches: [{{path: {{type: PathPrefix, value: /new}}}}]
    filters:
    - type: URLRewrite
      urlRewrite: {{path: {{type: ReplacePrefixMatch, replacePrefixMatch: /large}}}}
    backendRefs: [{{name: web-v2, port: 80}}]
  - matches: [{{path: {{type: Exact, value: /old}}}}]
    filters:
    - type: RequestRedirect
      requestRedirect: {{hostname: example.com, statusCode: 301}}
  - matches: [{{headers: [{{name: x-version, value: v2}}]}}]
    backendRefs: [{{name: web-v2, port: 80}}]
  - filters:
    - type: ResponseHeaderModifier
      responseHeaderModifier: {{set: [{{name: x-route, value: gateway}}], remove: [server]}}
    backendRefs: [{{name: web-v1, port: 80}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: web, namespace: shop}}
spec:
  hosts: [web]
  http: [{{directResponse: {{status: 418}}}}]
",
        service("v1", "10.96.0.21"),
        service("v2", "10.96.0.22")
    );
    bed.apply("routes", &routes)?;
    in_force(&bed, &["-i"], |answer| answer.contains("x-route: gateway"))?;
    let head = curl(&bed, "shop/frontend", &["-i", &url("/")])?;
    ensure!(head.contains("\nv1 ") && !head.to_lowercase().contains("\nserver:"), "{head}");
    let chosen = curl(&bed, "shop/frontend", &["-H", "x-version: v2", &url("/")])?;
    ensure!(chosen.starts_with("v2 "), "{chosen}");
    let size =
        curl(&bed, "shop/frontend", &["-o", "/dev/null", "-w", "%{size_download}", &url("/new/file")])?;
    ensure!(size == (8 << 20).to_string(), "the prefix was not replaced: {size} bytes");
    // Whole segments: /newer is not below /new.
    let other = curl(&bed, "shop/frontend", &[&url("/newer")])?;
    ensure!(other.starts_with("v1 "), "{other}");
    let moved = curl(
        &bed,
        "shop/frontend",
        &["-o", "/dev/null", "-w", "%{http_code} %{redirect_url}", &url("/old")],
    )?;
    ensure!(moved == "301 http://example.com/old", "{moved}");
    Ok(())
}

fn actions() -> Result<()> {
    let mut bed = open(|bed| Ok(vec![server(bed, "v1", "a", false)?]))?;
    let route = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: shop}
spec:
  hosts: [web]
  http:
  - match: [{uri: {prefix: /abort}}]
    fault: {abort: {httpStatus: 418, percentage: {value: 100}}}
    route: [{destination: {host: web}}]
  - match: [{uri: {prefix: /half}}]
    fault: {abort: {httpStatus: 503, percentage: {value: 50}}}
    retries: {attempts: 0}
    route: [{destination: {host: web}}]
  - match: [{uri: {prefix: /slow}}]
    fault: {delay: {fixedDelay: 1s, percentage: {value: 100}}}
    route: [{destination: {host: web}}]
  - match: [{uri: {exact: /moved}}]
    redirect: {uri: /here, redirectCode: 308}
  - match: [{uri: {exact: /closed}}]
    directResponse: {status: 503, body: {string: 'closed for today'}}
  - match: [{uri: {prefix: /shared}}]
    corsPolicy: {allowOrigins: [{exact: 'https://shop.example'}], allowMethods: [GET], maxAge: 1m}
    route: [{destination: {host: web}}]
  - rewrite: {uriRegexRewrite: {match: '^/v[0-9]+/(.*)', rewrite: '/\\1'}}
    route: [{destination: {host: web}}]
    headers: {response: {set: {x-rules: 'yes'}}}
";
    bed.apply("route", route)?;
    in_force(&bed, &["-i"], |answer| answer.contains("x-rules: yes"))?;
    ensure!(from_frontend(&bed, &[&url("/abort")])? == "418", "no abort");
    let half = from_frontend(&bed, &["-w", "%{http_code}\n", &url("/half/[1-400]")])?;
    let aborted = half.lines().filter(|line| line.starts_with("503")).count();
    // Six standard deviations.
    ensure!((140..=260).contains(&aborted), "{aborted} of 400 were aborted at 50 %");
    let began = Instant::now();
    ensure!(from_frontend(&bed, &[&url("/slow")])? == "200", "the delayed request failed");
    ensure!(began.elapsed() >= Duration::from_secs(1), "no delay");
    let target = ["-o", "/dev/null", "-w", "%{http_code} %{redirect_url}"];
    let moved = curl(&bed, "shop/frontend", &[&target[..], &[&url("/moved")]].concat())?;
    ensure!(moved == format!("308 {}", url("/here")), "{moved}");
    let closed = curl(&bed, "shop/frontend", &["-w", " %{http_code}", &url("/closed")])?;
    ensure!(closed == "closed for today 503", "{closed}");
    let preflight = ["-i", "-X", "OPTIONS", "-H", "access-control-request-method: GET"];
    let shared = url("/shared/x");
    let asked = [&preflight[..], &["-H", "origin: https://shop.example", &shared]].concat();
    let answer = curl(&bed, "shop/frontend", &asked)?.to_lowercase();
    ensure!(answer.contains("access-control-allow-origin: https://shop.example"), "{answer}");
    let asked = ["-i", "-H", "origin: https://other.example"];
    let answer = curl(&bed, "shop/frontend", &[&asked[..], &[&shared]].concat())?.to_lowercase();
    ensure!(!answer.contains("access-control-allow-origin"), "{answer}");
    let size =
        curl(&bed, "shop/frontend", &["-o", "/dev/null", "-w", "%{size_download}", &url("/v12/large/file")])?;
    ensure!(size == (8 << 20).to_string(), "the expression did not rewrite: {size} bytes");
    Ok(())
}

fn access() -> Result<()> {
    need("openssl")?;
    let mut bed = open(|bed| Ok(vec![server(bed, "v1", "a", false)?]))?;
    let Tokens { keys, good, expired, foreign, guest } = Tokens::issue(&bed.dir)?;
    let rules = format!(
        "
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: issuer, namespace: shop}}
spec:
  targetRefs: [{{group: '', kind: Service, name: web}}]
  jwtRules: [{{issuer: 'https://issuer.example', jwks: '{keys}'}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: web, namespace: shop}}
spec:
  targetRefs: [{{group: '', kind: Service, name: web}}]
  action: ALLOW
  rules:
  - from: [{{source: {{principals: [cluster.local/ns/shop/sa/frontend]}}}}]
    to: [{{operation: {{methods: [GET], paths: ['/', '/public/*']}}}}]
  - from: [{{source: {{requestPrincipals: ['https://issuer.example/alice']}}}}]
    to: [{{operation: {{paths: ['/private/*']}}}}]
    when: [{{key: 'request.auth.claims[role]', values: [admin]}}]
"
    );
    bed.apply("rules", &rules)?;
    wait::until_true("policy in force", SOON, || Ok(from_frontend(&bed, &[&url("/private/x")])? == "403"))?;
    let denied = curl(&bed, "shop/frontend", &[&url("/private/x")])?;
    ensure!(denied == "RBAC: access denied", "{denied}");
    let expect = |from: &str, args: &[&str], code: &str| {
        let got = status(&bed, from, args)?;
        ensure!(got == code, "{from} got {got} and not {code} for {}", args.join(" "));
        Ok(())
    };
    expect("shop/frontend", &[&url("/public/x")], "200")?;
    expect("shop/other", &[&url("/public/x")], "403")?;
    expect("shop/frontend", &["-X", "DELETE", &url("/public/x")], "403")?;
    // However it is written, it is the same path, and the server gets it in that form.
    for path in
        ["/public/../private/x", "//private/x", "/%70rivate/x", "/public/%2e%2e/private/x", "/./private/x"]
    {
        expect("shop/frontend", &["--path-as-is", &url(path)], "403")?;
    }
    let bearer = |token: &str| format!("authorization: Bearer {token}");
    for (token, code) in [(&good, "200"), (&expired, "401"), (&foreign, "401"), (&guest, "403")] {
        expect("shop/other", &["-H", &bearer(token), &url("/private/x")], code)?;
    }
    // A token that is not true is refused wherever it is sent.
    expect("shop/frontend", &["-H", &bearer(&expired), &url("/public/x")], "401")?;
    expect("shop/frontend", &["-H", &bearer(&good), &url("/public/x")], "200")
}

fn changes() -> Result<()> {
    need("wrk")?;
    let mut bed = open(both)?;
    let route = |n: u32| {
        format!(
            "{SUBSETS}
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: web, namespace: shop}}
spec:
  hosts: [web]
  http:
  - match: [{{headers: {{x-number: {{exact: '{n}'}}}}}}]
    route: [{{destination: {{host: web, subset: v2}}}}]
  - route: [{{destination: {{host: web, subset: v{}}}}}]
    headers: {{response: {{set: {{x-number: '{n}'}}}}}}
",
            n % 2 + 1
        )
    };
    bed.apply("route", &route(0))?;
    in_force(&bed, &["-i"], |answer| answer.contains("x-number: 0"))?;
    let mut wrk = bed.pod("shop/frontend")?.spawn(["wrk", "-t1", "-c8", "-d20s", &url("/")])?;
    let began = Instant::now();
    let mut slowest = Duration::ZERO;
    for n in 1..=1000 {
        let written = Instant::now();
        bed.apply("route", &route(n))?;
        // Every fiftieth is waited for, so that no change only overtakes another.
        if n % 50 == 0 {
            let header = format!("x-number: {n}");
            in_force(&bed, &["-i"], |answer| answer.contains(&header))?;
            slowest = slowest.max(written.elapsed());
        }
    }
    eprintln!(
        "  1,000 changes in {:.1} s, the slowest in force after {slowest:.2?}",
        began.elapsed().as_secs_f64()
    );
    ensure!(!wrk.log().contains("Requests/sec"), "the load ended before the last change");
    let ended = wrk.wait(Duration::from_secs(40))?;
    let log = wrk.log();
    ensure!(ended.success() && log.contains("Requests/sec"), "{log}");
    ensure!(!log.contains("Non-2xx") && !log.contains("Socket errors"), "{log}");
    Ok(())
}

/// A client of another namespace of the mesh.
const TEAM: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: team, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: team}
spec: {nodeName: a, containers: [{name: main, image: none}]}
";

fn exported() -> Result<()> {
    let mut bed = open(|bed| Ok(vec![server(bed, "v1", "a", false)?]))?;
    bed.apply("team", TEAM)?;
    enrolled(&bed, &["team/client"])?;
    let site = bed.pod("outside/site")?.v4;
    let objects = |to: &str| {
        format!(
            "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: web, namespace: shop}}
spec:
  hosts: [web]
  exportTo: ['{to}']
  http: [{{headers: {{response: {{set: {{x-rule: seen}}}}}}, route: [{{destination: {{host: web}}}}]}}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: site, namespace: shop}}
spec:
  hosts: [site.example]
  exportTo: ['{to}']
  addresses: [240.240.7.7]
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  resolution: STATIC
  endpoints: [{{address: {site}, ports: {{http: 8081}}}}]
"
        )
    };
    let host = |bed: &Testbed, from: &str| -> Result<bool> {
        let said = bed.pod(from)?.run(["dig", "+short", "+tries=1", "+time=3", "site.example"])?;
        Ok(said.out.trim() == "240.240.7.7")
    };
    bed.apply("exported", &objects("."))?;
    in_force(&bed, &["-i"], |answer| answer.contains("x-rule: seen"))?;
    wait::until_true("host of the own namespace", SOON, || host(&bed, "shop/frontend"))?;
    ensure!(!host(&bed, "team/client")?, "a host of another namespace only is known to a client");
    // A rule is for proxies, and the waypoint is one of its own namespace.
    bed.apply("exported", &objects("team"))?;
    in_force(&bed, &["-i"], |answer| answer.contains("v1 ") && !answer.contains("x-rule: seen"))?;
    bed.apply("exported", &objects("*"))?;
    in_force(&bed, &["-i"], |answer| answer.contains("x-rule: seen"))?;
    wait::until_true("host that is for everybody", SOON, || host(&bed, "team/client"))
}
