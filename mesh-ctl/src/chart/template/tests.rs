use serde_json::json;

use super::*;

fn render(text: &str, root: &Value) -> Result<String, TemplateError> {
    let mut templates = Templates::default();
    templates.add("t", text)?;
    Ok(templates.render(root)?.remove(0).1)
}

#[test]
fn values_blocks_and_trimming_read_as_in_go() {
    let root = json!({"a": {"b": "x", "n": 3, "none": {}}, "list": ["p", "q"], "map": {"z": "1", "y": "2"}});
    for (template, expected) in [
        ("a: {{ .a.b }}\n", "a: x\n"),
        ("{{ .a.n }}|{{ $.a.b | quote }}", "3|\"x\""),
        ("a\n{{- if .a.none }}\nb\n{{- else if eq .a.b \"x\" }}\nc\n{{- else }}\nd\n{{- end }}\n", "a\nc\n"),
        ("{{- range .list }}\n- {{ . }}\n{{- end }}", "\n- p\n- q"),
        ("{{ range $k, $v := .map }}{{ $k }}={{ $v }},{{ end }}", "y=2,z=1,"),
        ("{{ range .a.none }}x{{ else }}none{{ end }}", "none"),
        ("{{ with .a }}{{ .b }}{{ $.list | toYaml | nindent 2 }}{{ end }}", "x\n  - p\n  - q"),
        ("{{ with .missing }}x{{ else }}y{{ end }}", "y"),
        ("{{/* said */}}x{{- /* more */ -}} y", "xy"),
        ("{{ .missing | default \"d\" }}{{ default \"d\" .a.b }}", "dx"),
        ("{{ printf \"%s/%d}}\" (base \"/a/b\") 7 }}", "b/7}}"),
        ("{{ add .a.n 30 }} {{ dir \"/run/x/y.sock\" }} {{ and true (not false) }}", "33 /run/x true"),
        ("{{ define \"l\" }}<{{ .b }}>{{ end }}{{ template \"l\" .a }}", "<x>"),
    ] {
        assert_eq!(render(template, &root).unwrap(), expected, "{template}");
    }
}

#[test]
fn what_is_not_understood_or_missing_is_named_with_its_line() {
    for (template, line, expected) in [
        ("a\n{{ .missing }}", 2, "no value"),
        ("{{ .a.b.c }}", 1, "no fields"),
        ("\n\n{{ if .a }}", 3, "no `end`"),
        ("{{ end }}", 1, "`end` without"),
        ("{{ frob .a }}", 1, "no function `frob`"),
        ("{{ .a", 1, "without `}}`"),
        ("{{ template \"x\" . }}", 1, "no template is called \"x\""),
        ("{{ $x }}", 1, "no variable $x"),
        ("{{ }}", 1, "empty"),
        ("{{ .a | | quote }}", 1, "empty"),
    ] {
        let error = render(template, &json!({"a": {"b": "x"}})).unwrap_err();
        assert_eq!(error.line, line, "{template}: {error}");
        assert!(error.to_string().contains(expected), "{template}: {error}");
    }
}
