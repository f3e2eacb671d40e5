//! Compiles the wire messages with protox: no protoc binary is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "proto/istio/workload.proto",
        "proto/istio/authorization.proto",
        "proto/istio/ca.proto",
        "proto/envoy/discovery.proto",
        "proto/envoy/ext_authz.proto",
        "proto/opentelemetry/trace.proto",
        "proto/undermesh/node.proto",
        "proto/undermesh/l7.proto",
        "proto/kubernetes/cri.proto",
    ];
    let descriptors = protox::compile(files, ["proto"])?;
    // Keys are never printed: `xds::proto` says what is.
    let secret = [".undermesh.l7.v1.Credential"];
    tonic_prost_build::configure().btree_map(".").skip_debug(secret).compile_fds(descriptors)?;
    println!("cargo::rerun-if-changed=proto");
    Ok(())
}
