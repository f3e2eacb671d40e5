//! Certificates of gateways on a real API server, with exactly the rights that the control plane is given in a cluster.

mod apiserver;

use apiserver::{ApiServer, Control, GATEWAY_API, ISTIO, RBAC, until};

const GATEWAY: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: in, namespace: shop}
spec:
  gatewayClassName: istio
  listeners: [{name: https, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: cert}]}}]
";

/// A Secret with a certificate of its own, and with the key of another one if that is given.
fn secret(name: &str, kind: &str, key: Option<&str>) -> (String, String) {
    let made = rcgen::generate_simple_self_signed(vec!["a.example".to_owned()]).expect("a certificate");
    let own = made.signing_key.serialize_pem();
    let (chain, key) = (made.cert.pem(), key.unwrap_or(&own));
    let text = format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: {name}, namespace: shop}}\ntype: {kind}\nstringData: {{tls.crt: {chain:?}, tls.key: {key:?}}}\n"
    );
    (text, own)
}

fn start(rights: &str) -> Option<(ApiServer, Control)> {
    let server = ApiServer::start()?;
    server.apply(rights);
    if !server.install_crds(&[GATEWAY_API]) {
        return None;
    }
    server.apply(GATEWAY);
    let kubeconfig = server.kubeconfig_of("istio-system", "undermesh-control");
    let control = Control::start(&server, "a", &kubeconfig, &[]);
    Some((server, control))
}

fn held(control: &Control) -> Vec<String> {
    let all = control.json("/debug/objects");
    let names = all["Secret"].as_array().cloned().unwrap_or_default();
    names.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect()
}

/// The version of what the gateway's proxies are told.
fn told(control: &Control) -> Option<String> {
    let dump = control.json("/debug/config_dump");
    let told = &dump["forWaypoints"]["um-credential"]["Gateway/shop/in/Secret/shop/cert"];
    told.as_str().map(str::to_owned)
}

fn said(control: &Control, what: &str) -> bool {
    control.get("/debug/conditions").is_some_and(|(_, text)| text.contains(what))
}

#[test]
fn a_secret_is_read_while_a_gateway_names_it_and_no_other_is() {
    let Some((server, control)) = start(RBAC) else { return };
    server.apply(&secret("other", "kubernetes.io/tls", None).0);
    control.wait_ready();
    until("the Gateway says what is missing", || said(&control, "there is no Secret shop/cert"));
    assert!(held(&control).is_empty());
    // One of another type is none, whatever is in it.
    server.apply(&secret("cert", "Opaque", None).0);
    let (first, key) = secret("cert", "kubernetes.io/tls", None);
    server.text(&["delete", "secret", "-n", "shop", "cert"]);
    server.apply(&first);
    until("the certificate is told", || told(&control).is_some());
    assert_eq!(held(&control), ["shop/cert"]);
    let version = told(&control);
    // Renewed, then spoiled: the last good one stays.
    server.apply(&secret("cert", "kubernetes.io/tls", None).0);
    until("the new certificate is told", || told(&control).is_some_and(|now| Some(&now) != version.as_ref()));
    let good = told(&control);
    server.apply(&secret("cert", "kubernetes.io/tls", Some(&key)).0);
    until("the Gateway says what is wrong", || said(&control, "is not the one of the first certificate"));
    assert_eq!(told(&control), good);
    // The Gateway names another.
    server.apply(&GATEWAY.replace("name: cert", "name: other"));
    until("the other Secret is held instead", || held(&control) == ["shop/other"]);
    server.text(&["delete", "secret", "-n", "shop", "other"]);
    until("what is gone is let go", || held(&control).is_empty());
    let secret = key.lines().nth(1).unwrap();
    assert!(!control.logged().contains(secret), "a key is in the log");
}

/// Istio's Gateway, and a pod of the gateway that it selects.
const SELECTING: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: default, namespace: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: proxy, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: in, istio: ingressgateway}}
spec: {nodeName: a, automountServiceAccountToken: false, containers: [{name: main, image: none}]}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: public, namespace: shop}
spec:
  selector: {istio: ingressgateway}
  servers:
  - {port: {number: 443, name: https, protocol: HTTPS}, hosts: ['*'], tls: {mode: SIMPLE, credentialName: cert}}
";

#[test]
fn an_opaque_secret_is_read_while_an_istio_gateway_names_it() {
    let Some(server) = ApiServer::start() else { return };
    server.apply(RBAC);
    if !server.install_crds(&[GATEWAY_API, ISTIO]) {
        return;
    }
    server.apply(SELECTING);
    server.apply(&secret("cert", "Opaque", None).0);
    server.apply(&secret("other", "Opaque", None).0);
    let kubeconfig = server.kubeconfig_of("istio-system", "undermesh-control");
    let control = Control::start(&server, "a", &kubeconfig, &[]);
    control.wait_ready();
    until("the certificate is told", || told(&control).is_some());
    assert_eq!(held(&control), ["shop/cert"]);
    server.text(&["delete", "gateways.networking.istio.io", "-n", "shop", "public"]);
    until("what nobody names is let go", || held(&control).is_empty() && told(&control).is_none());
}

#[test]
fn a_control_plane_that_may_not_read_secrets_does_everything_else() {
    let line = "- {apiGroups: [\"\"], resources: [secrets], verbs: [get, list, watch]}\n";
    assert!(RBAC.contains(line));
    let Some((server, control)) = start(&RBAC.replace(line, "")) else { return };
    server.apply(&secret("cert", "kubernetes.io/tls", None).0);
    control.wait_ready();
    until("it says what it lacks", || control.logged().contains("may not be read; give get, list and watch"));
    until("the Gateway says what is missing", || said(&control, "there is no Secret shop/cert"));
}
