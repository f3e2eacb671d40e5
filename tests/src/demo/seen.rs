//! The chapter in which the mesh is looked at: the live map, and a fault that one command finds.

use super::{SOON, Story, indent, shop};
use crate::bed::process::{find, finish};
use crate::bed::{Testbed, wait};
use anyhow::{Context, Result};
use serde_json::Value;
use std::time::Duration;

const MAP: &str = "http://127.0.0.1:15014/map";
/// What a firewall of somebody else does.
const DROP: &str = "table inet um_demo {\n chain input {\n type filter hook input priority 0;\n tcp dport 8081 drop\n }\n}\n";
/// From the fault to the answer.
const FOUND: Duration = Duration::from_secs(20);

pub(super) fn seen(bed: &Testbed, story: &mut Story) -> Result<()> {
    story.chapter("Looking at it: the live map, and one command for a fault");
    let customers = shop::customers(bed)?;
    map(bed, story)?;
    fault(bed, story)?;
    customers.stop().map(drop)
}

/// Who talks to whom, as the control plane knows it from all nodes.
fn map(bed: &Testbed, story: &mut Story) -> Result<()> {
    let mut edges = Vec::new();
    let shown = wait::until_true("customers on the map", SOON, || {
        let graph: Value = serde_json::from_str(&bed.control_get("/flows/graph?seconds=60")?)?;
        edges = graph["edges"].as_array().cloned().unwrap_or_default();
        let of = |edge: &Value, end: &str| edge[end]["name"].as_str().unwrap_or_default().to_owned();
        Ok(edges.iter().any(|edge| of(edge, "source") == "frontend" && of(edge, "destination") == "catalog"))
    });
    for edge in &edges {
        let end = |end: &str| {
            let text = |field: &str| edge[end][field].as_str().unwrap_or_default();
            [text("namespace"), text("name")].join("/")
        };
        let path = edge["path"].as_str().unwrap_or_default();
        story.show(&format!(
            "    {:<16} -> {:<16} {path:<9} {:>6} connections",
            end("source"),
            end("destination"),
            edge["opened"]
        ));
    }
    story.claim("the map shows who talks to whom, and over which path", shown.is_ok(), "it does not");
    let enter = format!("nsenter --net={}", bed.control_netns.path().display());
    story.say("The same as a page, which the control plane serves; while the shop is open:");
    story.show(&format!("    {enter} chromium --no-sandbox {MAP}"));
    match picture(bed) {
        Ok(Some(path)) => story.show(&format!("    a picture of it: {path}")),
        Ok(None) => {}
        Err(error) => story.claim("a browser shows the map", false, &format!("{error:#}")),
    }
    Ok(())
}

/// A picture of the page, where there is a browser and the page was built in.
fn picture(bed: &Testbed) -> Result<Option<String>> {
    let Some(chromium) = find("chromium") else { return Ok(None) };
    if bed.control_get("/map").is_err() {
        return Ok(None);
    }
    let to = std::env::temp_dir().join("undermesh-map.png");
    let argv = [
        "env".to_owned(),
        format!("HOME={}", bed.dir.display()),
        chromium.display().to_string(),
        "--headless".to_owned(),
        "--no-sandbox".to_owned(),
        "--disable-gpu".to_owned(),
        "--no-proxy-server".to_owned(),
        "--window-size=1280,800".to_owned(),
        "--timeout=6000".to_owned(),
        format!("--screenshot={}", to.display()),
        MAP.to_owned(),
    ];
    finish(&bed.control_place, argv, Duration::from_secs(60))?.ok()?;
    std::fs::metadata(&to).context("the browser left no picture")?;
    Ok(Some(to.display().to_string()))
}

/// A firewall drops what a pod is sent, and the mesh says so.
fn fault(bed: &Testbed, story: &mut Story) -> Result<()> {
    story.say("Now somebody's firewall drops what is for site, outside of the mesh. The visitor only sees a timeout. One command:");
    let to = bed.pod("outside/site")?.at(8081).to_string();
    bed.pod("outside/site")?.netns.nft(DROP)?;
    let mut text = String::new();
    let found = wait::until_true("the drop in the answer", FOUND, || {
        bed.pod("outside/visitor")?.call(&to, &["--send", "x", "--timeout-ms", "1500"])?;
        text = bed.meshctl_any("a", &["why", "outside/visitor", "outside/site:8081"])?;
        Ok(text.contains("NETFILTER_DROP"))
    });
    bed.pod("outside/site")?.netns.nft("delete table inet um_demo\n")?;
    story.show("    meshctl why outside/visitor outside/site:8081");
    story.show(&indent(&text));
    story.claim(
        "meshctl why finds the dropped packets and says where to look",
        found.is_ok() && text.contains("fix:"),
        &text,
    );
    Ok(())
}
