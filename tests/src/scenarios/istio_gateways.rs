//! Istio's own Gateways with VirtualServices that name them, at the product's gateway: clients that we did not write (curl,
//! openssl) from outside the mesh.

use super::programs::{need, nginx_conf};
use super::shop::{SHOP, enrolled};
use super::waypoint::{SOON, server};
use super::{Scenario, scenario};
use crate::bed::mesh::MeshOptions;
use crate::bed::pki::{Issued, Leaf, Pki};
use crate::bed::process::Finished;
use crate::bed::tokens::Tokens;
use crate::bed::{Testbed, Topology, wait};
use anyhow::{Context, Result, ensure};
use std::path::Path;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("an Istio Gateway serves HTTP, HTTPS, TLS and TCP at the proxies that it selects", 150, serves),
    scenario(
        "an Istio Gateway lets in clients with a certificate of the right authority and name only",
        120,
        mutual,
    ),
    scenario("policies that select a gateway's pods hold at it", 120, policies),
    scenario("a gateway checks tokens, by what RequestAuthentications that select it say", 120, tokens),
    scenario(
        "where the mesh says so, an Istio Gateway is for proxies of its own namespace only",
        120,
        scoped,
    ),
];

const GATEWAY: &str = "edge/istio-ingressgateway";

/// A Gateway and VirtualServices of namespace shop; the proxies and their Secrets are in namespace edge.
const OBJECTS: &str = "
apiVersion: v1
kind: Service
metadata: {name: istio-ingressgateway, namespace: edge}
spec:
  clusterIP: 10.96.0.30
  clusterIPs: [10.96.0.30]
  selector: {istio: ingressgateway}
  ports:
  - {name: http2, port: 80, targetPort: 8080}
  - {name: https, port: 443, targetPort: 8443}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.20
  clusterIPs: [10.96.0.20]
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: public, namespace: shop}
spec:
  selector: {istio: ingressgateway}
  servers:
  - {port: {number: 80, name: http, protocol: HTTP}, hosts: [plain.example]}
  - {port: {number: 80, name: http-moved, protocol: HTTP}, hosts: ['*.moved.example'], tls: {httpsRedirect: true}}
  - port: {number: 443, name: https, protocol: HTTPS}
    hosts: [a.moved.example, b.moved.example]
    tls: {mode: SIMPLE, credentialName: site}
  - port: {number: 443, name: https-mutual, protocol: HTTPS}
    hosts: [mutual.example]
    tls: {mode: MUTUAL, credentialName: mutual, subjectAltNames: [buyer.example]}
  - {port: {number: 443, name: tls-pass, protocol: TLS}, hosts: [pass.example], tls: {mode: PASSTHROUGH}}
  - {port: {number: 31400, name: tcp, protocol: TCP}, hosts: ['*']}
  - {port: {number: 9443, name: tls, protocol: TLS}, hosts: [db.moved.example], tls: {mode: SIMPLE, credentialName: site}}
  - {port: {number: 7443, name: https-broken, protocol: HTTPS}, hosts: ['*'], tls: {mode: SIMPLE, credentialName: nowhere}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: shop}
spec:
  hosts: ['*']
  gateways: [public]
  http:
  - match: [{uri: {exact: /productpage}}, {uri: {prefix: /static}}]
    route: [{destination: {host: web, port: {number: 80}}}]
  - match: [{uri: {prefix: /secure}, port: 443}]
    route: [{destination: {host: web}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: streams, namespace: shop}
spec:
  hosts: ['*']
  gateways: [shop/public]
  tcp:
  - match: [{port: 31400}]
    route: [{destination: {host: backend, port: {number: 80}}}]
  - match: [{port: 9443}]
    route: [{destination: {host: backend, port: {number: 80}}}]
  tls:
  - match: [{port: 443, sniHosts: [pass.example]}]
    route: [{destination: {host: secure, port: {number: 443}}}]
";

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// A Secret of namespace edge, with these names of its parts.
fn secret(name: &str, kind: &str, parts: &[(&str, &Path)]) -> Result<String> {
    let mut data = Vec::new();
    for (key, path) in parts {
        data.push(format!("{key}: {:?}", read(path)?));
    }
    Ok(format!(
        "
apiVersion: v1
kind: Secret
metadata: {{name: {name}, namespace: edge}}
type: {kind}
stringData: {{{}}}
",
        data.join(", ")
    ))
}

/// The pod of the gateway.
fn proxy(bed: &Testbed) -> Result<String> {
    let mut argv = bed.waypoint_command("edge", "istio-ingressgateway", "a")?;
    argv.extend(["--pod=istio-ingressgateway", "--role=gateway", "--workers=2"].map(str::to_owned));
    let command = serde_json::to_string(&argv).context("a command is text")?;
    Ok(format!(
        "
apiVersion: v1
kind: Namespace
metadata: {{name: edge}}
---
apiVersion: v1
kind: Pod
metadata:
  name: istio-ingressgateway
  namespace: edge
  labels:
    istio: ingressgateway
    gateway.networking.k8s.io/gateway-name: istio-ingressgateway
    istio.io/dataplane-mode: none
spec:
  nodeName: a
  serviceAccountName: istio-ingressgateway
  containers: [{{name: main, image: none, command: {command}}}]
---"
    ))
}

/// A server with TLS of its own that says what it was asked for, and who the gateway says has asked.
fn secure(bed: &Testbed, issued: &Issued) -> Result<String> {
    let servers = format!(
        "server {{ listen 8443 ssl; ssl_certificate {}; ssl_certificate_key {}; location / {{ return 200 'passed $ssl_server_name\\n'; }} }}
  server {{ listen 8080; location / {{ return 200 '[$http_x_forwarded_client_cert]\\n'; }} }}",
        issued.chain.display(),
        issued.key.display()
    );
    let config = nginx_conf(&bed.dir.join("nginx-secure"), &servers)?;
    Ok(format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: secure, namespace: shop, labels: {{app: secure}}}}
spec:
  nodeName: b
  serviceAccountName: backend
  containers: [{{name: main, image: none, command: [{}, -c, {}], ports: [{{containerPort: 8443}}]}}]
---
apiVersion: v1
kind: Service
metadata: {{name: secure, namespace: shop}}
spec:
  clusterIP: 10.96.0.21
  clusterIPs: [10.96.0.21]
  selector: {{app: secure}}
  ports: [{{name: tls, port: 443, targetPort: 8443}}, {{name: http, port: 80, targetPort: 8080}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: told, namespace: shop}}
spec:
  hosts: [mutual.example, plain.example]
  gateways: [public]
  http: [{{match: [{{uri: {{exact: /told}}}}], route: [{{destination: {{host: secure, port: {{number: 80}}}}}}]}}]
---",
        need("nginx")?.display(),
        config.display()
    ))
}

struct Edge {
    bed: Testbed,
    pki: Pki,
}

impl Edge {
    fn open() -> Result<Self> {
        need("openssl")?;
        let mut bed = Testbed::build(&Topology::nodes(&["a", "b"]), SHOP)?;
        bed.start_mesh(&MeshOptions::default())?;
        let pki = Pki::create(&bed.dir.join("public"), "public")?;
        let issue = |name: &str, san: &str| pki.issue(name, Leaf::of(san));
        let site = issue("site", "DNS:*.moved.example")?;
        let mutual = issue("mutual", "DNS:mutual.example")?;
        let pass = issue("pass", "DNS:pass.example")?;
        issue("buyer", "DNS:buyer.example")?;
        issue("other", "DNS:other.example")?;
        let root = pki.root();
        bed.apply(
            "site",
            &secret("site", "kubernetes.io/tls", &[("tls.crt", &site.chain), ("tls.key", &site.key)])?,
        )?;
        let parts = [("cert", &*mutual.chain), ("key", &*mutual.key), ("cacert", &*root)];
        bed.apply("mutual", &secret("mutual", "Opaque", &parts)?)?;
        let yaml = [server(&bed, "v1", "b", false)?, secure(&bed, &pass)?, proxy(&bed)?, OBJECTS.to_owned()];
        bed.apply("edge", &yaml.join("\n"))?;
        bed.wait_waypoint_ready(GATEWAY)?;
        enrolled(&bed, &["shop/v1", "shop/secure"])?;
        let edge = Self { bed, pki };
        wait::until_true("answer of the gateway", SOON, || {
            Ok(edge.get("http://plain.example:8080/productpage", &[])?.out.starts_with("v1 "))
        })?;
        Ok(edge)
    }

    /// A program of the client outside the mesh.
    fn run(&self, argv: &[&str]) -> Result<Finished> {
        self.bed.pod("outside/visitor")?.run(argv.iter().copied())
    }

    /// GET by curl, which finds every host at the gateway and trusts the public authority only.
    fn get(&self, url: &str, args: &[&str]) -> Result<Finished> {
        let gateway = self.bed.pod(GATEWAY)?.v4;
        let (root, to) = (self.pki.root(), format!("::{gateway}:"));
        let own = [
            "curl",
            "-sS",
            "--max-time",
            "20",
            "--cacert",
            &root.to_string_lossy(),
            "--connect-to",
            &to,
            url,
        ]
        .map(str::to_owned);
        let own: Vec<&str> = own.iter().map(String::as_str).collect();
        self.run(&[&own[..], args].concat())
    }

    /// The status of an answer.
    fn status(&self, url: &str, args: &[&str]) -> Result<String> {
        Ok(self.get(url, &[&["-o", "/dev/null", "-w", "%{http_code}"], args].concat())?.out)
    }
}

fn serves() -> Result<()> {
    let edge = Edge::open()?;
    // Rules, ports and hosts.
    for (url, status) in [
        ("http://plain.example:8080/static/a", "200"),
        ("http://plain.example:8080/other", "404"),
        ("http://plain.example:8080/secure", "404"),
        ("http://unknown.example:8080/productpage", "404"),
        ("https://a.moved.example:8443/productpage", "200"),
        ("https://b.moved.example:8443/secure", "200"),
    ] {
        ensure!(edge.status(url, &[])? == status, "{url} was not answered {status}");
    }
    let moved = ["-o", "/dev/null", "-w", "%{http_code} %{redirect_url}"];
    let said = edge.get("http://x.moved.example:8080/productpage?a=b", &moved)?.out;
    ensure!(said == "301 https://x.moved.example/productpage?a=b", "{said:?}");
    // A connection may be used for the hosts of its server, and of no other.
    for (host, status) in [("b.moved.example", "200"), ("mutual.example", "421"), ("c.example", "404")] {
        let header = format!("Host: {host}");
        let said = edge.status("https://a.moved.example:8443/productpage", &["-H", &header])?;
        ensure!(said == status, "a request for {host} was answered {said}");
    }
    // Streams: in the clear, out of TLS that ends here, and in TLS that does not.
    let (gateway, words) = (edge.bed.pod(GATEWAY)?.v4, "as they come");
    let called = edge.bed.pod("outside/visitor")?;
    let outcome = called.call(&format!("{gateway}:31400"), &["--send", words, "--half-close"])?;
    ensure!(outcome.ok && outcome.received == words, "{} got {:?}", outcome.problem(), outcome.received);
    // The client waits for the end of what the server says, which waits for that of the client's.
    let script = format!(
        "(echo {words}; sleep 2) | timeout 5 openssl s_client -quiet -connect {gateway}:9443 -servername \
         db.moved.example -verify_return_error -CAfile {} || true",
        edge.pki.root().display()
    );
    let done = edge.run(&["sh", "-c", &script])?;
    ensure!(done.out.trim() == words, "the echo inside TLS was {:?}: {}", done.out, done.err);
    let done = edge.get("https://pass.example:8443/", &[])?;
    ensure!(done.out == "passed pass.example\n", "passed on was {:?}: {}", done.out, done.err);
    // What is not served says so.
    let broken = edge.get("https://a.moved.example:7443/", &[])?;
    ensure!(broken.status.code() == Some(7), "port 7443 answered: {}", broken.err);
    let conditions = edge.bed.control_get("/debug/conditions")?;
    ensure!(conditions.contains("there is no Secret edge/nowhere with tls.crt and tls.key"), "{conditions}");
    Ok(())
}

fn mutual() -> Result<()> {
    let edge = Edge::open()?;
    let url = "https://mutual.example:8443/told";
    let shown = |name: &str| {
        let at =
            |part: &str| edge.pki.dir().join(format!("{name}-{part}.pem")).to_string_lossy().into_owned();
        [at("chain"), at("key")]
    };
    let with = |name: &str| {
        let [chain, key] = shown(name);
        edge.get(url, &["--cert", &chain, "--key", &key])
    };
    let said = with("buyer")?;
    ensure!(said.status.success(), "the buyer was refused: {}", said.err);
    for part in
        ["[Hash=", ";Cert=\"-----BEGIN%20CERTIFICATE-----", ";Subject=\"CN=buyer\"", ";DNS=buyer.example]"]
    {
        ensure!(said.out.contains(part), "the endpoint was not told {part:?}: {:?}", said.out);
    }
    for (who, done) in [("nobody", edge.get(url, &[])?), ("other", with("other")?)] {
        ensure!(!done.status.success() && done.out.is_empty(), "{who} was let in: {:?}", done.out);
    }
    // Of another authority, with the right name.
    let foreign = Pki::create(&edge.bed.dir.join("foreign"), "foreign")?;
    let issued = foreign.issue("buyer", Leaf::of("DNS:buyer.example"))?;
    let [chain, key] = [issued.chain, issued.key].map(|path| path.to_string_lossy().into_owned());
    let done = edge.get(url, &["--cert", &chain, "--key", &key])?;
    ensure!(!done.status.success() && done.out.is_empty(), "a stranger was let in: {:?}", done.out);
    // Nobody says of himself what a gateway says.
    let claim = ["-H", "X-Forwarded-Client-Cert: Hash=beef;DNS=buyer.example"];
    let done = edge.get("http://plain.example:8080/told", &claim)?;
    ensure!(done.out == "[]\n", "the endpoint was told {:?}", done.out);
    Ok(())
}

fn policies() -> Result<()> {
    let mut edge = Edge::open()?;
    let url = "http://plain.example:8080/static/a";
    ensure!(edge.status(url, &[])? == "200", "the gateway does not serve");
    edge.bed.apply(
        "policy",
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: closed, namespace: edge}
spec:
  selector: {matchLabels: {istio: ingressgateway}}
  action: DENY
  rules: [{to: [{operation: {paths: [/static/*], methods: [GET]}}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: elsewhere, namespace: shop}
spec:
  selector: {matchLabels: {istio: ingressgateway}}
  action: DENY
  rules: [{to: [{operation: {paths: [/productpage]}}]}]
",
    )?;
    wait::until_true("denial by the gateway", SOON, || Ok(edge.status(url, &[])? == "403"))?;
    // Another method, another path, and a policy of another namespace.
    for (url, args) in [
        (url, &["-X", "POST"][..]),
        ("http://plain.example:8080/productpage", &[]),
        ("https://a.moved.example:8443/secure", &[]),
    ] {
        let said = edge.status(url, args)?;
        // nginx takes no POST for a page of its own text, and that is the endpoint's answer.
        ensure!(said == "200" || said == "405", "{url} {args:?} was answered {said}");
    }
    Ok(())
}

fn tokens() -> Result<()> {
    let mut edge = Edge::open()?;
    let tokens = Tokens::issue(&edge.bed.dir)?;
    let url = "http://plain.example:8080/productpage";
    let with =
        |edge: &Edge, token: &str| edge.status(url, &["-H", &format!("authorization: Bearer {token}")]);
    edge.bed.apply(
        "issuer",
        &format!(
            "
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: issuer, namespace: edge}}
spec:
  selector: {{matchLabels: {{istio: ingressgateway}}}}
  jwtRules: [{{issuer: 'https://issuer.example', jwks: '{}'}}]
",
            tokens.keys
        ),
    )?;
    wait::until_true("refusal of a token of another key", SOON, || {
        Ok(with(&edge, &tokens.foreign)? == "401")
    })?;
    ensure!(with(&edge, &tokens.expired)? == "401", "a token that has expired holds");
    ensure!(with(&edge, &tokens.good)? == "200", "a token of the issuer does not hold");
    ensure!(edge.status(url, &[])? == "200", "nothing demands a token yet");
    edge.bed.apply(
        "demand",
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: demand, namespace: edge}
spec:
  selector: {matchLabels: {istio: ingressgateway}}
  action: DENY
  rules: [{from: [{source: {notRequestPrincipals: ['*']}}]}]
",
    )?;
    wait::until_true("demand for a token", SOON, || Ok(edge.status(url, &[])? == "403"))?;
    ensure!(with(&edge, &tokens.good)? == "200", "who has a token is refused");
    Ok(())
}

fn scoped() -> Result<()> {
    let mut edge = Edge::open()?;
    let url = "http://plain.example:8080/productpage";
    edge.bed.apply(
        "settings",
        "
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data: {undermesh: 'scopeGatewayToNamespace: true'}
",
    )?;
    // Nobody listens any more.
    wait::until_true("end of the other namespace's gateway", SOON, || {
        Ok(edge.get(url, &[])?.status.code() == Some(7))
    })?;
    let conditions = edge.bed.control_get("/debug/conditions")?;
    ensure!(conditions.contains("spec.selector selects no gateway"), "{conditions}");
    edge.bed.apply(
        "own",
        "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: own, namespace: edge}
spec:
  selector: {istio: ingressgateway}
  servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: [plain.example]}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: own, namespace: edge}
spec:
  hosts: [plain.example]
  gateways: [own]
  http: [{route: [{destination: {host: web.shop.svc.cluster.local, port: {number: 80}}}]}]
",
    )?;
    wait::until_true("answer by the proxies' own namespace", SOON, || Ok(edge.status(url, &[])? == "200"))
}
