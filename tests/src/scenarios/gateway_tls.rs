//! TLS at the product's own gateway, with clients that we did not write (curl, openssl, h2load) and certificates that
//! openssl has made.

use super::programs::{need, nginx_conf};
use super::shop::{SHOP, enrolled};
use super::waypoint::{SOON, server};
use super::{Scenario, scenario};
use crate::bed::mesh::MeshOptions;
use crate::bed::pki::{Issued, Leaf, Pki};
use crate::bed::process::Finished;
use crate::bed::{Testbed, Topology, wait};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("a gateway ends TLS with the certificate of the name that a client asks for", 120, names),
    scenario("a gateway's keys are told to its own proxies and shown to nobody", 120, secrecy),
    scenario("a certificate that is renewed under load fails no request", 120, rotation),
    scenario("a gateway passes TLS on to the service that the asked name decides on", 120, passthrough),
    scenario("a gateway passes on streams, as they come and out of TLS that ends at it", 120, streams),
    scenario(
        "a gateway lets in clients with a certificate only, where its listener asks for one",
        120,
        mutual,
    ),
];

const GATEWAY: &str = "shop/in";

/// The shop with Service `web`, a gateway, and clients outside the mesh.
struct Shop {
    bed: Testbed,
    pki: Pki,
}

fn secret(name: &str, issued: &Issued) -> Result<String> {
    let read = |path: &std::path::Path| {
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
    };
    let (chain, key) = (read(&issued.chain)?, read(&issued.key)?);
    Ok(format!(
        "
apiVersion: v1
kind: Secret
metadata: {{name: {name}, namespace: shop}}
type: kubernetes.io/tls
stringData: {{tls.crt: {chain:?}, tls.key: {key:?}}}
---"
    ))
}

const OBJECTS: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.20
  clusterIPs: [10.96.0.20]
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: in, namespace: shop, annotations: {gateway.istio.io/service-account: in}}
spec:
  gatewayClassName: istio
  listeners:
  - {name: plain, port: 80, protocol: HTTP}
  - {name: exact, port: 443, protocol: HTTPS, hostname: a.example, tls: {certificateRefs: [{name: exact}]}}
  - {name: wild, port: 443, protocol: HTTPS, hostname: '*.wild.example', tls: {certificateRefs: [{name: wild}]}}
  - {name: pass, port: 443, protocol: TLS, hostname: pass.example, tls: {mode: Passthrough}}
  - {name: broken, port: 8443, protocol: HTTPS, tls: {certificateRefs: [{name: nowhere}]}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  parentRefs: [{name: in}]
  hostnames: [a.example, '*.wild.example']
  rules: [{backendRefs: [{name: web, port: 80}]}]
";

/// A pod that runs the gateway's program; `account` is who it proves to be.
fn proxy(bed: &Testbed, account: &str) -> Result<String> {
    let mut argv = bed.waypoint_command("shop", account, "a")?;
    for argument in &mut argv {
        if argument.starts_with("--gateway=") {
            *argument = "--gateway=in".to_owned();
        }
    }
    let more = [
        &format!("--service-account={account}"),
        &format!("--pod={account}"),
        "--role=gateway",
        "--workers=2",
    ];
    argv.extend(more.map(str::to_owned));
    let command = serde_json::to_string(&argv).context("a command is text")?;
    Ok(format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {account}, namespace: shop, labels: {{istio.io/dataplane-mode: none}}}}
spec:
  nodeName: a
  serviceAccountName: {account}
  containers: [{{name: main, image: none, command: {command}}}]
---"
    ))
}

impl Shop {
    fn open(more: impl FnOnce(&Testbed, &Pki) -> Result<String>) -> Result<Self> {
        need("openssl")?;
        let mut bed = Testbed::build(&Topology::nodes(&["a", "b"]), SHOP)?;
        bed.start_mesh(&MeshOptions::default())?;
        let pki = Pki::create(&bed.dir.join("public"), "public")?;
        let exact = pki.issue("exact", Leaf::of("DNS:a.example"))?;
        let wild = pki.issue("wild", Leaf::of("DNS:*.wild.example"))?;
        let secrets = [secret("exact", &exact)?, secret("wild", &wild)?];
        bed.apply("exact", &secrets[0])?;
        bed.apply("wild", &secrets[1])?;
        let yaml =
            [server(&bed, "v1", "b", false)?, more(&bed, &pki)?, proxy(&bed, "in")?, OBJECTS.to_owned()];
        bed.apply("web", &yaml.join("\n"))?;
        bed.wait_waypoint_ready(GATEWAY)?;
        enrolled(&bed, &["shop/v1"])?;
        let shop = Self { bed, pki };
        wait::until_true("answer of the gateway", SOON, || Ok(shop.get("a.example", &[])?.status.success()))?;
        Ok(shop)
    }

    /// A program of the client outside the mesh.
    fn run(&self, argv: &[&str]) -> Result<Finished> {
        self.bed.pod("outside/visitor")?.run(argv.iter().copied())
    }

    /// GET of a host by curl, which trusts the public authority only.
    fn get(&self, host: &str, args: &[&str]) -> Result<Finished> {
        let root = self.pki.root();
        let to = format!("{host}:443:{}", self.bed.pod(GATEWAY)?.v4);
        let url = format!("https://{host}/");
        let own = [
            "curl",
            "-sS",
            "--max-time",
            "20",
            "--fail-with-body",
            "--cacert",
            &root.to_string_lossy(),
            "--resolve",
            &to,
            &url,
        ];
        self.run(&[&own[..], args].concat())
    }

    /// The serial number of the certificate that a client gets for a name.
    fn serial(&self, name: &str) -> Result<String> {
        let to = format!("{}:443", self.bed.pod(GATEWAY)?.v4);
        let script = format!(
            "openssl s_client -connect {to} -servername {name} </dev/null | openssl x509 -noout -serial"
        );
        Ok(self.run(&["sh", "-c", &script])?.ok()?.trim().to_owned())
    }
}

/// A server that says what it is told of the client.
fn told(bed: &Testbed) -> Result<String> {
    let said = "$http_x_forwarded_proto from $http_x_forwarded_for";
    let servers = format!("server {{ listen 8080; location / {{ return 200 '{said}\\n'; }} }}");
    let config = nginx_conf(&bed.dir.join("nginx-told"), &servers)?;
    Ok(format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: told, namespace: shop, labels: {{app: told}}}}
spec:
  nodeName: b
  serviceAccountName: backend
  containers: [{{name: main, image: none, command: [{}, -c, {}], ports: [{{containerPort: 8080}}]}}]
---
apiVersion: v1
kind: Service
metadata: {{name: told, namespace: shop}}
spec:
  clusterIP: 10.96.0.22
  clusterIPs: [10.96.0.22]
  selector: {{app: told}}
  ports: [{{name: http, port: 80, targetPort: 8080}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: told, namespace: shop}}
spec: {{parentRefs: [{{name: in}}], hostnames: [told.wild.example], rules: [{{backendRefs: [{{name: told, port: 80}}]}}]}}
---",
        need("nginx")?.display(),
        config.display()
    ))
}

fn names() -> Result<()> {
    let shop = Shop::open(|bed, _| told(bed))?;
    let version = ["-w", " %{http_version} %{http_code}"];
    for (host, args, expected) in [
        ("a.example", &["--http2"][..], " 2 200"),
        ("a.example", &["--http1.1"], " 1.1 200"),
        ("a.example", &["--no-alpn"], " 1.1 200"),
        ("a.example", &["--tls-max", "1.2", "--http2"], " 2 200"),
        ("b.wild.example", &["--http2"], " 2 200"),
        ("c.b.wild.example", &["-k"], " 2 200"),
    ] {
        let done = shop.get(host, &[args, &version].concat())?;
        let said = done.ok().with_context(|| format!("{host} {args:?}"))?;
        ensure!(said.starts_with("v1 ") && said.ends_with(expected), "{host} {args:?}: {said:?}");
    }
    // Without a listener for the name there is no certificate either; nor is there anything older than TLS 1.2.
    for (host, args) in [
        ("other.example", &["-k"][..]),
        ("a.example", &["--tls-max", "1.1", "--ciphers", "DEFAULT@SECLEVEL=0"]),
    ] {
        let done = shop.get(host, args)?;
        ensure!(done.status.code() == Some(35), "{host} {args:?}: curl ended with {:?}", done.status);
    }
    // A connection is to one listener: hosts of another are told to come again, and unknown ones are not there.
    for (host, status) in [("b.wild.example", "421"), ("other.example", "404"), ("A.example:443", "200")] {
        let header = format!("Host: {host}");
        let done = shop.get("a.example", &["-H", &header, "-o", "/dev/null", "-w", "%{http_code}"])?;
        ensure!(done.out == status, "a request for {host} was answered {:?}", done.out);
    }
    // What the endpoint is told of how the client came is not for the client to say.
    let client = shop.bed.pod("outside/visitor")?.v4;
    for (url, scheme) in [("https", "https"), ("http", "http")] {
        let to = format!(
            "told.wild.example:{}:{}",
            if url == "https" { 443 } else { 80 },
            shop.bed.pod(GATEWAY)?.v4
        );
        let url = format!("{url}://told.wild.example/");
        let claims = ["-H", "X-Forwarded-Proto: gopher"];
        let done =
            shop.run(&[&["curl", "-ksS", "--max-time", "20", "--resolve", &to, &url][..], &claims].concat())?;
        ensure!(done.out == format!("{scheme} from {client}\n"), "the endpoint was told {:?}", done.out);
    }
    let script = format!(
        "openssl s_client -connect {}:443 -servername a.example -alpn h2 </dev/null",
        shop.bed.pod(GATEWAY)?.v4
    );
    let said = shop.run(&["sh", "-c", &script])?;
    for part in ["ALPN protocol: h2", "subject=CN = exact", "TLSv1.3", "public, CN = intermediate"] {
        ensure!(said.out.contains(part), "openssl did not say {part:?}: {}", said.out);
    }
    // A listener whose certificate is not there does not listen.
    let broken = format!("https://{}:8443/", shop.bed.pod(GATEWAY)?.v4);
    let done = shop.run(&["curl", "-skS", "--max-time", "5", &broken])?;
    ensure!(done.status.code() == Some(7), "port 8443 answered: {}", done.err);
    let conditions = shop.bed.control_get("/debug/conditions")?;
    ensure!(conditions.contains("there is no Secret shop/nowhere of type kubernetes.io/tls"), "{conditions}");
    Ok(())
}

fn secrecy() -> Result<()> {
    let shop = Shop::open(|bed, _| proxy(bed, "thief"))?;
    let Shop { bed, pki } = &shop;
    // Who runs the gateway's program under another name gets its routes and none of its keys.
    wait::until_true("complaint of the other proxy", SOON, || {
        Ok(bed.pod("shop/thief")?.log().contains("was not told to this proxy"))
    })?;
    let thief = bed.pod("shop/thief")?.v4;
    let http =
        shop.run(&["curl", "-sS", "--max-time", "5", "-H", "Host: a.example", &format!("http://{thief}/")])?;
    ensure!(http.status.success(), "the other proxy serves nothing at all: {}", http.err);
    let to = format!("a.example:443:{thief}");
    let https = shop.run(&["curl", "-skS", "--max-time", "5", "--resolve", &to, "https://a.example/"])?;
    ensure!(https.status.code() == Some(35), "the other proxy ends TLS: {:?} {}", https.status, https.out);
    let mut shown =
        vec![("the control plane's log", bed.control.as_ref().context("no control plane")?.log())];
    for page in ["/debug/config_dump", "/debug/conditions", "/debug/objects", "/debug/syncz", "/debug/errors"]
    {
        shown.push((page, bed.control_get(page)?));
    }
    for pod in [GATEWAY, "shop/thief"] {
        shown.push((pod, bed.pod(pod)?.log()));
        shown.push((pod, bed.at_waypoint(pod, 15_000, "/config_dump")?));
        shown.push((pod, bed.at_waypoint(pod, 15_000, "/status")?));
    }
    let key = std::fs::read_to_string(pki.dir().join("exact-key.pem")).context("cannot read the key")?;
    let secret = key.lines().nth(1).context("the key has no second line")?;
    for (place, text) in &shown {
        ensure!(!text.is_empty(), "{place} says nothing");
        ensure!(!text.contains(secret) && !text.contains("PRIVATE KEY"), "the key is shown by {place}");
    }
    Ok(())
}

fn rotation() -> Result<()> {
    let mut shop = Shop::open(|_, _| Ok(String::new()))?;
    let h2load = need("h2load")?;
    let address = shop.bed.pod(GATEWAY)?.v4;
    let connect = format!("--connect-to={address}:443");
    let argv = [
        &*h2load.to_string_lossy(),
        "-c",
        "8",
        "-m",
        "4",
        "-t",
        "1",
        "-D",
        "12",
        &connect,
        "https://a.example/",
    ];
    let visitor = shop.bed.pod("outside/visitor")?;
    let mut load = visitor.spawn(argv)?;
    // Others come anew for every request, and check what they are shown.
    let script = format!(
        "end=$(($(date +%s)+11)); n=0; while [ $(date +%s) -lt $end ]; do curl -sS -o /dev/null --max-time 10 --fail --cacert {} \
         --resolve a.example:443:{address} https://a.example/ || exit 1; n=$((n+1)); done; echo $n",
        shop.pki.root().display()
    );
    let mut comers = visitor.spawn(["sh", "-c", &script])?;
    let mut serials = vec![shop.serial("a.example")?];
    for n in 0..4 {
        let name = format!("exact{n}");
        let issued = shop.pki.issue(&name, Leaf::of("DNS:a.example"))?;
        shop.bed.apply("exact", &secret("exact", &issued)?)?;
        let last = serials.last().cloned().unwrap_or_default();
        let new = wait::until("another certificate", SOON, || {
            let serial = shop.serial("a.example")?;
            Ok((serial != last).then_some(serial))
        })?;
        ensure!(!serials.contains(&new), "{new} came twice");
        serials.push(new);
    }
    load.wait(Duration::from_secs(60))?;
    comers.wait(Duration::from_secs(60))?;
    let said = load.log();
    ensure!(said.contains(" 0 failed, 0 errored, 0 timeout"), "h2load lost requests: {said}");
    let all = comers.log();
    let count: u64 = all.trim().parse().with_context(|| format!("curl failed: {all}"))?;
    ensure!(count > 20, "only {count} clients came anew");
    // A certificate that is no good changes nothing, and says so.
    let (key, chain) = (shop.pki.dir().join("wild-key.pem"), shop.pki.dir().join("exact-chain.pem"));
    shop.bed.apply("exact", &secret("exact", &Issued { chain, key })?)?;
    wait::until_true("condition of the Gateway", SOON, || {
        let said = shop.bed.control_get("/debug/conditions")?;
        Ok(said.contains("is not the one of the first certificate")
            && said.contains("the last good one is in force"))
    })?;
    ensure!(
        shop.serial("a.example")? == *serials.last().context("no serial")?,
        "another certificate is shown"
    );
    shop.get("a.example", &[])?.ok().map(drop)
}

fn passthrough() -> Result<()> {
    let shop = Shop::open(|bed, pki| {
        let issued = pki.issue("pass", Leaf::of("DNS:pass.example"))?;
        let dir = bed.dir.join("nginx-tls");
        let servers = format!(
            "server {{ listen 8443 ssl; ssl_certificate {}; ssl_certificate_key {}; location / {{ return 200 'passed $ssl_server_name\\n'; }} }}",
            issued.chain.display(),
            issued.key.display()
        );
        let config = nginx_conf(&dir, &servers)?;
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
  ports: [{{name: tls, port: 443, targetPort: 8443}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {{name: pass, namespace: shop}}
spec: {{parentRefs: [{{name: in}}], hostnames: [pass.example], rules: [{{backendRefs: [{{name: secure, port: 443}}]}}]}}
---",
            need("nginx")?.display(),
            config.display()
        ))
    })?;
    wait::until_true("answer of who is behind the gateway", SOON, || {
        Ok(shop.get("pass.example", &[])?.out == "passed pass.example\n")
    })?;
    // On the same port TLS ends at the gateway for other names.
    ensure!(shop.get("a.example", &[])?.ok()?.starts_with("v1 "), "a.example is not served");
    Ok(())
}

fn listen(shop: &mut Shop, listener: &Value) -> Result<()> {
    shop.bed.edit("Gateway", "in", |gateway| {
        if let Some(listeners) = gateway["spec"]["listeners"].as_array_mut() {
            listeners.push(listener.clone());
        }
    })
}

fn streams() -> Result<()> {
    let mut shop = Shop::open(|_, _| Ok(String::new()))?;
    let certificate = json!([{"name": "exact"}]);
    let tls = json!({"mode": "Terminate", "certificateRefs": certificate});
    listen(&mut shop, &json!({"name": "stream", "port": 9000, "protocol": "TCP"}))?;
    listen(
        &mut shop,
        &json!({"name": "ended", "port": 9443, "protocol": "TLS", "hostname": "a.example", "tls": tls}),
    )?;
    shop.bed.apply(
        "streams",
        "
apiVersion: gateway.networking.k8s.io/v1alpha2
kind: TCPRoute
metadata: {name: stream, namespace: shop}
spec:
  parentRefs: [{name: in, sectionName: stream}, {name: in, sectionName: ended}]
  rules: [{backendRefs: [{name: backend, port: 80}]}]
",
    )?;
    let (gateway, words) = (shop.bed.pod(GATEWAY)?.v4, "as they come");
    wait::until_true("echo through the gateway", SOON, || {
        let visitor = shop.bed.pod("outside/visitor")?;
        let outcome = visitor.call(&format!("{gateway}:9000"), &["--send", words, "--half-close"])?;
        Ok(outcome.ok && outcome.received == words)
    })?;
    // The client waits for the end of what the server says, which waits for that of the client's.
    let script = format!(
        "(echo {words}; sleep 2) | timeout 5 openssl s_client -quiet -connect {gateway}:9443 -servername a.example \
         -verify_return_error -CAfile {} || true",
        shop.pki.root().display()
    );
    let done = shop.run(&["sh", "-c", &script])?;
    ensure!(done.out.trim() == words, "the echo inside TLS was {:?}: {}", done.out, done.err);
    Ok(())
}

fn mutual() -> Result<()> {
    let mut shop = Shop::open(|_, pki| {
        let root = std::fs::read_to_string(pki.root()).context("cannot read the root")?;
        Ok(format!(
            "
apiVersion: v1
kind: Secret
metadata: {{name: exact-cacert, namespace: shop}}
stringData: {{ca.crt: {root:?}}}
---"
        ))
    })?;
    let options = json!({"gateway.istio.io/tls-terminate-mode": "MUTUAL"});
    let tls = json!({"certificateRefs": [{"name": "exact"}], "options": options});
    listen(
        &mut shop,
        &json!({"name": "mutual", "port": 10443, "protocol": "HTTPS", "hostname": "a.example", "tls": tls}),
    )?;
    let get = |certificate: Option<&Issued>| -> Result<Finished> {
        let (to, root) = (format!("a.example:10443:{}", shop.bed.pod(GATEWAY)?.v4), shop.pki.root());
        let (root, text) = (root.to_string_lossy(), |path: &Path| path.to_string_lossy().into_owned());
        let mut argv = vec!["curl", "-sS", "--max-time", "20", "--cacert", &root, "--resolve", &to];
        let shown = certificate.map(|issued| (text(&issued.chain), text(&issued.key)));
        if let Some((chain, key)) = &shown {
            argv.extend(["--cert", chain, "--key", key]);
        }
        argv.push("https://a.example:10443/");
        shop.run(&argv)
    };
    let buyer = shop.pki.issue("buyer", Leaf::of("DNS:buyer.example"))?;
    wait::until_true("answer to a client with a certificate", SOON, || {
        Ok(get(Some(&buyer))?.out.starts_with("v1 "))
    })?;
    let foreign = Pki::create(&shop.bed.dir.join("foreign"), "foreign")?;
    let stranger = foreign.issue("buyer", Leaf::of("DNS:buyer.example"))?;
    for (who, done) in [("nobody", get(None)?), ("a stranger", get(Some(&stranger))?)] {
        ensure!(!done.status.success() && done.out.is_empty(), "{who} was let in: {:?}", done.out);
    }
    // The other listeners ask for none.
    ensure!(shop.get("a.example", &[])?.ok()?.starts_with("v1 "), "port 443 does not serve");
    Ok(())
}
