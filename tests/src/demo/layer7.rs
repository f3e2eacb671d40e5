//! The demo's chapter of requests: canary, a failing pod, a fault, a token.

use super::story::Story;
use super::{SOON, indent};
use crate::bed::tokens::Tokens;
use crate::bed::{Testbed, Waypoint, process, wait};
use anyhow::{Context, Result};
use std::time::Duration;

const URL: &str = "http://10.96.0.50";
const REQUESTS: usize = 200;

/// nginx as pod `shop/<name>` of service pay, with this answer.
fn server(name: &str, node: &str, version: &str, answer: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, labels: {{app: pay, version: {version}}}}}
spec:
  nodeName: {node}
  serviceAccountName: pay
  containers:
  - name: nginx
    image: none
    command:
    - sh
    - -c
    - |
      cat > $UM_DIR/nginx.conf <<END
      daemon off; user root; pid $UM_DIR/nginx.pid; events {{ worker_connections 512; }}
      http {{
        access_log off;
        client_body_temp_path $UM_DIR/t1; proxy_temp_path $UM_DIR/t2; fastcgi_temp_path $UM_DIR/t3;
        uwsgi_temp_path $UM_DIR/t4; scgi_temp_path $UM_DIR/t5;
        server {{ listen 8080; location / {{ {answer}; }} }}
      }}
      END
      exec nginx -e stderr -c $UM_DIR/nginx.conf
    ports: [{{containerPort: 8080}}]
---"
    )
}

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: pay, namespace: shop, labels: {istio.io/use-waypoint: wp}}
spec:
  clusterIP: 10.96.0.50
  clusterIPs: [10.96.0.50]
  selector: {app: pay}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: pay, namespace: shop}
spec:
  host: pay
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
";

/// What curl gets: the answers, or with `-w` what that says.
fn curl(bed: &Testbed, args: &[&str]) -> Result<Vec<String>> {
    let argv = ["curl", "-sS", "--max-time", "20"].iter().chain(args).copied();
    let done = process::finish(&bed.pod("shop/frontend")?.place, argv, Duration::from_secs(60))?;
    Ok(done.ok()?.lines().map(str::to_owned).collect())
}

fn codes(bed: &Testbed, args: &[&str]) -> Result<Vec<String>> {
    curl(bed, &[&["-o", "/dev/null", "-w", "%{http_code}\\n"], args].concat())
}

/// Applies the rules of VirtualService pay, and waits until they are in force.
fn rules(bed: &mut Testbed, story: &Story, number: u32, http: &str) -> Result<()> {
    let text = format!(
        "apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: pay, namespace: shop}}
spec:
  hosts: [pay]
  http:
{http}"
    );
    story.show(&indent(text.split_once("  http:\n").map_or("", |(_, rules)| rules)));
    bed.apply("l7-rules", &text)?;
    // The last rule marks its answers.
    let mark = format!("x-rules: {number}");
    wait::until_true("rules in force", SOON, || {
        let head = curl(bed, &["-i", &format!("{URL}/")])?;
        Ok(head.iter().any(|line| line.eq_ignore_ascii_case(&mark)))
    })
}

/// Tells the chapter.
pub(super) fn tell(bed: &mut Testbed, story: &mut Story) -> Result<()> {
    story.chapter("A waypoint reads the requests of one service: canary, retries, faults, tokens");
    bed.deploy_waypoint(&Waypoint::of_shop("b"))?;
    let servers = [
        server("pay-v1", "a", "v1", "return 200 'v1\\n'"),
        server("pay-v2", "b", "v2", "return 200 'v2\\n'"),
    ];
    bed.apply("l7", &format!("{}{SERVICE}", servers.concat()))?;
    bed.wait_enrolled(&["shop/pay-v1", "shop/pay-v2"])?;
    canary(bed, story)?;
    retries(bed, story)?;
    fault(bed, story)?;
    tokens(bed, story)?;
    story.say("What the waypoint decides by, and what it has counted:");
    for args in [["waypoint", "routes"], ["waypoint", "endpoints"]] {
        let shown = bed.meshctl_in(&bed.pod("shop/wp")?.place, &args)?;
        story.show(&indent(shown.ok()?));
    }
    Ok(())
}

fn canary(bed: &mut Testbed, story: &mut Story) -> Result<()> {
    story.say("Version 2 of service pay gets every fifth request:");
    let http = "  - route:
    - {destination: {host: pay, subset: v1}, weight: 80}
    - {destination: {host: pay, subset: v2}, weight: 20}
    headers: {response: {set: {x-rules: '1'}}}
";
    rules(bed, story, 1, http)?;
    let said = curl(bed, &[&format!("{URL}/[1-{REQUESTS}]")])?;
    let of = |version: &str| said.iter().filter(|line| *line == version).count();
    let (one, two) = (of("v1"), of("v2"));
    story.show(&format!("    {REQUESTS} requests: {one} to v1, {two} to v2"));
    // Five standard deviations.
    let holds = one + two == REQUESTS && (12..=68).contains(&two);
    story.claim("a canary at 20 % gets its share", holds, &format!("{one} and {two}"));
    Ok(())
}

fn retries(bed: &mut Testbed, story: &mut Story) -> Result<()> {
    story.say("A third pod of pay fails every request (503). Without retries, with the default ones off:");
    bed.apply("l7-failing", &server("pay-broken", "b", "v1", "return 503"))?;
    bed.wait_enrolled(&["shop/pay-broken"])?;
    let http = |retries: &str, number: u32| {
        format!(
            "  - route: [{{destination: {{host: pay}}}}]
    retries: {retries}
    headers: {{response: {{set: {{x-rules: '{number}'}}}}}}
"
        )
    };
    let failed = |bed: &Testbed| -> Result<usize> {
        Ok(codes(bed, &[&format!("{URL}/[1-{REQUESTS}]")])?.iter().filter(|code| *code != "200").count())
    };
    rules(bed, story, 2, &http("{attempts: 0}", 2))?;
    let without = failed(bed)?;
    rules(bed, story, 3, &http("{attempts: 3, retryOn: 'gateway-error,connect-failure,refused-stream'}", 3))?;
    let with = failed(bed)?;
    story.show(&format!("    failed requests of {REQUESTS}: {without} without retries, {with} with them"));
    story.claim("a failing pod fails no request that may be retried", with == 0 && without > 0, "see above");
    bed.remove("l7-failing")
}

fn fault(bed: &mut Testbed, story: &mut Story) -> Result<()> {
    story.say("A fault for testers only, to see how the frontend copes with a slow and failing pay:");
    let http = "  - match: [{headers: {x-tester: {exact: 'yes'}}}]
    fault: {delay: {fixedDelay: 500ms, percentage: {value: 100}}, abort: {httpStatus: 418, percentage: {value: 100}}}
    route: [{destination: {host: pay}}]
  - route: [{destination: {host: pay}}]
    headers: {response: {set: {x-rules: '4'}}}
";
    rules(bed, story, 4, http)?;
    let url = format!("{URL}/");
    let with_time = ["-o", "/dev/null", "-w", "%{http_code} after %{time_total} s\\n"];
    let tester = curl(bed, &[&with_time[..], &["-H", "x-tester: yes", &url]].concat())?.join("");
    let other = curl(bed, &[&with_time[..], &[&url]].concat())?.join("");
    story.show(&format!("    tester:        {tester}\n    everybody else: {other}"));
    let waited = tester.split(' ').nth(2).and_then(|seconds| seconds.parse::<f64>().ok());
    let holds = tester.starts_with("418 ") && waited >= Some(0.5) && other.starts_with("200 ");
    story.claim("a fault hits those that it is for, and nobody else", holds, &format!("{tester}; {other}"));
    Ok(())
}

fn tokens(bed: &mut Testbed, story: &mut Story) -> Result<()> {
    story.say("Paying takes a token of our issuer:");
    let Tokens { keys, good, foreign, .. } = Tokens::issue(&bed.dir)?;
    let policy = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: pay, namespace: shop}
spec:
  targetRefs: [{group: '', kind: Service, name: pay}]
  action: ALLOW
  rules: [{from: [{source: {requestPrincipals: ['https://issuer.example/*']}}]}]
";
    let issuer = format!(
        "apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: pay, namespace: shop}}
spec:
  targetRefs: [{{group: '', kind: Service, name: pay}}]
  jwtRules: [{{issuer: 'https://issuer.example', jwks: '{keys}'}}]
---
"
    );
    story.show(&indent(policy.split_once("spec:\n").map_or("", |(_, spec)| spec)));
    bed.apply("l7-tokens", &format!("{issuer}{policy}"))?;
    let url = format!("{URL}/");
    let code = |bed: &Testbed, token: Option<&str>| -> Result<String> {
        let header = token.map(|token| format!("authorization: Bearer {token}"));
        let args: Vec<&str> = header.iter().flat_map(|header| ["-H", header]).chain([&*url]).collect();
        codes(bed, &args)?.pop().context("curl said nothing")
    };
    wait::until_true("policy in force", SOON, || Ok(code(bed, None)? == "403"))?;
    for (who, token, wanted) in [
        ("no token", None, "403"),
        ("a forged token", Some(&*foreign), "401"),
        ("a true token", Some(&*good), "200"),
    ] {
        let got = code(bed, token)?;
        story.show(&format!("    {who:<16} {got}"));
        story.claim(&format!("{who} is answered with {wanted}"), got == wanted, &format!("it was {got}"));
    }
    Ok(())
}
