//! The text of a scrape: OpenMetrics when the scraper asks for it, else the older text format.

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use super::request::EXEMPLAR;

/// Content type of OpenMetrics.
pub const OPENMETRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Content type of the text format.
pub const TEXT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Encodes the registry for a scraper's `Accept` header. Returns content type and body.
///
/// # Errors
/// A metric cannot be written as text.
pub fn scrape(registry: &Registry, accept: Option<&str>) -> Result<(&'static str, String), std::fmt::Error> {
    let mut body = String::new();
    encode(&mut body, registry)?;
    if accept.is_some_and(|accept| accept.contains("application/openmetrics-text")) {
        return Ok((OPENMETRICS_TYPE, body));
    }
    Ok((TEXT_TYPE, to_text_format(&body)))
}

/// The text format has no exemplars. In the value of a label the quote would be escaped.
fn without_exemplar(line: &str) -> &str {
    line.rfind(&format!(" # {{{EXEMPLAR}=\"")).map_or(line, |at| &line[..at])
}

/// OpenMetrics describes a counter by its name without `_total`, the text format with it; and the text format has neither
/// units nor an end mark.
fn to_text_format(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len());
    // HELP comes before TYPE, which says whether the name needs its suffix.
    let mut help: Option<(&str, &str)> = None;
    for line in openmetrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            let suffix = if kind == "counter" { "_total" } else { "" };
            if let Some((_, help)) = help.take().filter(|(helped, _)| *helped == name) {
                text.push_str(&format!("# HELP {name}{suffix} {help}\n"));
            }
            let kind = if kind == "unknown" { "untyped" } else { kind };
            text.push_str(&format!("# TYPE {name}{suffix} {kind}\n"));
        } else if !line.starts_with("# UNIT ") && line != "# EOF" {
            text.push_str(without_exemplar(line));
            text.push('\n');
        }
    }
    text
}
