//! What a tracepoint says in the running kernel, from the description of its record in tracefs.

use std::collections::{HashMap, HashSet};

/// A tracepoint's fields and the names of its reasons.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Format {
    fields: HashSet<String>,
    /// What the numbers of its field `reason` mean.
    pub(super) reasons: HashMap<u32, String>,
}

impl Format {
    /// Reads a `format` file. Lines that it does not understand say nothing.
    pub(super) fn parse(text: &str) -> Self {
        let fields = text.lines().filter_map(field).collect();
        let reasons = text.lines().find_map(|line| line.strip_prefix("print fmt:")).map(reasons);
        Self { fields, reasons: reasons.unwrap_or_default() }
    }

    /// Whether there is a field of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.fields.contains(name)
    }
}

/// `field:__u8 saddr[28]; offset:32; size:28; signed:0;`, with tabs between.
fn field(line: &str) -> Option<String> {
    let declared = line.trim().strip_prefix("field:")?.split(';').next()?.rsplit([' ', '*']).next()?;
    let name = declared.split('[').next()?;
    (!name.is_empty()).then(|| name.to_owned())
}

/// The list of `__print_symbolic(REC->reason, { 2, "NOT_SPECIFIED" }, …)`.
fn reasons(print: &str) -> HashMap<u32, String> {
    let Some((_, list)) = print.split_once("REC->reason,") else { return HashMap::new() };
    let list = list.split_once("})").map_or(list, |(list, _)| list);
    let entry = |text: &str| {
        let (number, name) = text.split_once(',')?;
        let number = number.trim();
        let number = match number.strip_prefix("0x") {
            Some(hex) => u32::from_str_radix(hex, 16).ok()?,
            None => number.parse().ok()?,
        };
        Some((number, name.split('"').nth(1)?.to_owned()))
    };
    list.split('{').filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEND_RESET: &str = "name: tcp_send_reset
ID: 2280
format:
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:const void * skaddr;\toffset:16;\tsize:8;\tsigned:0;
\tfield:enum sk_rst_reason reason;\toffset:28;\tsize:4;\tsigned:0;
\tfield:__u8 saddr[28];\toffset:32;\tsize:28;\tsigned:0;

print fmt: \"state=%s reason=%s\", REC->state ? __print_symbolic(REC->state, { 1, \"TCP_ESTABLISHED\" }) : \"\", \
         __print_symbolic(REC->reason, { 0, \"NOT_SPECIFIED\" }, { 0x1, \"NO_SOCKET\" })";

    #[test]
    fn a_format_tells_which_fields_there_are_and_what_reasons_mean() {
        let format = Format::parse(SEND_RESET);
        for (name, there) in [("skaddr", true), ("saddr", true), ("reason", true), ("sport", false)] {
            assert_eq!(format.has(name), there, "{name}");
        }
        let expected = [(0, "NOT_SPECIFIED".to_owned()), (1, "NO_SOCKET".to_owned())];
        assert_eq!(format.reasons, HashMap::from(expected));
    }

    #[test]
    fn text_that_is_no_format_says_nothing() {
        assert_eq!(Format::parse("field:;\noffset:1;\nprint fmt: REC->reason, { x }"), Format::default());
    }
}
