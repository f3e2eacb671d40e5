//! Questions to an authoriser that we did not write: the server of Istio's own task on external authorization, which
//! allows requests with `x-ext-authz: allow` and those of one service account, and says what it was asked.

use super::waypoint::{SOON, curl, open, url};
use super::waypoint_telemetry::{collector, nginx, settings};
use super::{Scenario, scenario, skip};
use crate::bed::{Testbed, process, wait};
use anyhow::{Context, Result, ensure};

pub(super) const SCENARIOS: &[Scenario] =
    &[scenario("Istio's own server for external authorization decides over gRPC and HTTP", 120, decides)];

const ALLOW: &str = "x-ext-authz: allow";
const RESULT: &str = "x-ext-authz-check-result";
const OVERRIDE: &str = "x-ext-authz-additional-header-override";

/// nginx that says what the authoriser had added to the request.
fn server(bed: &Testbed) -> Result<Vec<String>> {
    let servers = "server { listen 8080; location / { return 200 \
                   'result=$http_x_ext_authz_check_result override=$http_x_ext_authz_additional_header_override \
                   path=$request_uri\n'; } }";
    nginx(bed, servers)
}

/// As Istio's task has them; the second also gives and takes headers.
const PROVIDERS: &str = "extensionProviders:
- name: over-grpc
  envoyExtAuthzGrpc: {service: collector.shop.svc.cluster.local, port: 9000}
- name: over-http
  envoyExtAuthzHttp:
    service: collector.shop.svc.cluster.local
    port: 8000
    pathPrefix: /asked
    includeRequestHeadersInCheck: [x-ext-authz]
    includeAdditionalHeadersInCheck: {x-ext-authz-additional-header-override: from-the-mesh}
    headersToUpstreamOnAllow: [x-ext-authz-check-result, x-ext-authz-additional-header-override]
    headersToDownstreamOnDeny: [x-ext-authz-check-result]";

fn policy(provider: &str) -> String {
    format!(
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: asks, namespace: shop}}
spec:
  targetRefs: [{{group: '', kind: Service, name: web}}]
  action: CUSTOM
  provider: {{name: {provider}}}
  rules: [{{to: [{{operation: {{paths: [/headers]}}}}]}}]
"
    )
}

fn code(bed: &Testbed, args: &[&str]) -> Result<String> {
    let headers = url("/headers");
    curl(bed, "shop/frontend", &[&["-o", "/dev/null", "-w", "%{http_code}"], args, &[&headers]].concat())
}

fn decides() -> Result<()> {
    let program = process::find("extauthz")
        .ok_or_else(|| skip("no extauthz: `cargo xtask test testbed` builds it where there is Go"))?;
    let mut bed = open(server)?;
    let command =
        format!("{}, -http, '4318', -grpc, '4317', -allow_service_account, other", program.display());
    collector(
        &mut bed,
        &command,
        "[{name: grpc, port: 9000, targetPort: 4317}, {name: http, port: 8000, targetPort: 4318}]",
    )?;
    for port in [4317, 4318] {
        wait::until_true("authoriser", SOON, || bed.pod("shop/collector")?.listening(port))?;
    }
    bed.apply("settings", &settings(PROVIDERS))?;
    for (provider, asked, mark) in [
        ("over-grpc", "/headers", "[gRPCv3]"),
        // The prefix goes before the path.
        ("over-http", "/asked/headers", "[HTTP]"),
    ] {
        bed.apply("asks", &policy(provider))?;
        wait::until_true("denial by the authoriser", SOON, || {
            Ok(code(&bed, &[])? == "403"
                && bed.pod("shop/collector")?.log().contains(&format!("{mark}[denied]")))
        })
        .with_context(|| provider.to_owned())?;
        let denied = curl(&bed, "shop/frontend", &["-i", &url("/headers")])?;
        ensure!(denied.starts_with("HTTP/1.1 403"), "{provider}: {denied}");
        ensure!(denied.contains(&format!("{RESULT}: denied")), "{provider}: {denied}");
        ensure!(denied.contains("denied by ext_authz for not found header `x-ext-authz: allow`"), "{denied}");
        ensure!(denied.contains(OVERRIDE) == (provider == "over-grpc"), "{provider}: {denied}");
        let allowed = curl(&bed, "shop/frontend", &["-H", ALLOW, &url("/headers")])?;
        let value =
            if provider == "over-grpc" { "grpc-additional-header-override-value" } else { "from-the-mesh" };
        let expected = format!("result=allowed override={value} path=/headers\n");
        ensure!(allowed == expected, "{provider}: {allowed}");
        // A header that the authoriser sets is not the client's to set.
        let forged = format!("{OVERRIDE}: forged");
        let args = ["-H", ALLOW, "-H", &forged, &url("/headers")];
        ensure!(curl(&bed, "shop/frontend", &args)? == expected, "{provider}: a client's header stays");
        // What no rule names is not asked about.
        ensure!(curl(&bed, "shop/frontend", &[&url("/free")])?.contains("path=/free"), "{provider}");
        let log = bed.pod("shop/collector")?.log();
        let told = log.lines().find(|line| line.contains(&format!("{mark}[allowed]")));
        ensure!(told.is_some_and(|line| line.contains(asked)), "{provider}: {told:?}");
        ensure!(!log.contains("/free"), "{log}");
    }
    // Over gRPC it is told who asks, and allows one identity without the header.
    bed.apply("asks", &policy("over-grpc"))?;
    wait::until_true("leave for an identity", SOON, || {
        Ok(curl(&bed, "shop/other", &[&url("/headers")])?.contains("result=allowed"))
    })?;
    let log = bed.pod("shop/collector")?.log();
    ensure!(log.contains("spiffe://cluster.local/ns/shop/sa/other"), "{log}");
    // Without an answer nobody gets through, as `failOpen` is not given.
    bed.crash_pod("shop/collector")?;
    wait::until_true("refusal without an authoriser", SOON, || Ok(code(&bed, &["-H", ALLOW])? == "403"))
}
