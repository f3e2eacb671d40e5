//! Text to a tree.

use std::iter::Peekable;
use std::vec::IntoIter;

/// A part of a template. Numbers are lines.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    Text(String),
    Output(usize, Pipeline),
    /// Condition and body of `if` and each `else if`; then `else`.
    If(usize, Vec<(Pipeline, Vec<Self>)>, Vec<Self>),
    With(usize, Pipeline, Vec<Self>, Vec<Self>),
    Range(usize, Loop),
    Template(usize, String, Pipeline),
}

/// `range`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Loop {
    pub(super) key: Option<String>,
    pub(super) value: Option<String>,
    pub(super) over: Pipeline,
    pub(super) body: Vec<Node>,
    pub(super) otherwise: Vec<Node>,
}

/// Commands; each one's value is the last argument of the next.
pub(super) type Pipeline = Vec<Vec<Operand>>;

/// An argument or a function.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Operand {
    /// `.a.b`; `.` has no parts.
    Field(Vec<String>),
    /// `$x.a`; `$` has an empty name.
    Variable(String, Vec<String>),
    Text(String),
    Number(i64),
    Bool(bool),
    Function(String),
    Group(Pipeline),
}

pub(super) struct Parsed {
    pub(super) body: Vec<Node>,
    pub(super) defined: Vec<(String, Vec<Node>)>,
}

type Problem = (usize, String);

/// A piece of the text: literal, or what is between braces.
enum Piece {
    Text(String),
    Action(usize, String),
}

pub(super) fn parse(text: &str) -> Result<Parsed, Problem> {
    let mut pieces = split(text)?.into_iter().peekable();
    let mut defined = Vec::new();
    let (body, end) = nodes(&mut pieces, &mut defined, true)?;
    match end {
        None => Ok(Parsed { body, defined }),
        Some((line, word)) => Err((line, format!("`{word}` without `if`, `with`, `range` or `define`"))),
    }
}

fn split(text: &str) -> Result<Vec<Piece>, Problem> {
    let mut pieces = Vec::new();
    let mut rest = text;
    let mut line = 1;
    let mut trim = false;
    loop {
        let start = rest.find("{{");
        let literal = &rest[..start.unwrap_or(rest.len())];
        let mut kept = if trim { literal.trim_start() } else { literal };
        let Some(start) = start else {
            pieces.push(Piece::Text(kept.to_owned()));
            return Ok(pieces);
        };
        line += literal.matches('\n').count();
        let inside = &rest[start + 2..];
        let inside = inside.strip_prefix("- ").or_else(|| inside.strip_prefix("-\n")).inspect(|_| {
            kept = kept.trim_end();
        });
        let inside = inside.unwrap_or(&rest[start + 2..]);
        let end = end_of_action(inside).ok_or_else(|| (line, "`{{` without `}}`".to_owned()))?;
        let action = &inside[..end];
        let began = line;
        line += action.matches('\n').count();
        trim = action.ends_with(" -") || action.ends_with("\n-");
        let action = if trim { &action[..action.len() - 1] } else { action };
        pieces.push(Piece::Text(kept.to_owned()));
        if !action.trim_start().starts_with("/*") {
            pieces.push(Piece::Action(began, action.trim().to_owned()));
        }
        rest = &inside[end + 2..];
    }
}

/// Where `}}` is, outside of texts.
fn end_of_action(text: &str) -> Option<usize> {
    let mut quoted = false;
    let mut escaped = false;
    for (at, char) in text.char_indices() {
        match char {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '}' if !quoted && text[at..].starts_with("}}") => return Some(at),
            _ => {}
        }
    }
    None
}

type Pieces = Peekable<IntoIter<Piece>>;
/// The line of an `end` or `else`, and its text.
type End = (usize, String);

/// Nodes up to `end` or `else`, which is returned with its line.
fn nodes(
    pieces: &mut Pieces,
    defined: &mut Vec<(String, Vec<Node>)>,
    top: bool,
) -> Result<(Vec<Node>, Option<End>), Problem> {
    let mut list = Vec::new();
    while let Some(piece) = pieces.next() {
        let (line, action) = match piece {
            Piece::Text(text) => {
                if !text.is_empty() {
                    list.push(Node::Text(text));
                }
                continue;
            }
            Piece::Action(line, action) => (line, action),
        };
        let (word, rest) = action.split_once(char::is_whitespace).unwrap_or((action.as_str(), ""));
        let rest = rest.trim();
        match word {
            "end" | "else" => return Ok((list, Some((line, action)))),
            "if" => list.push(condition(pieces, defined, line, rest)?),
            "with" => {
                let subject = pipeline(line, rest)?;
                let (body, otherwise) = body(pieces, defined, line)?;
                list.push(Node::With(line, subject, body, otherwise));
            }
            "range" => {
                let (names, over) = match rest.split_once(":=") {
                    Some((names, over)) => (names, over),
                    None => ("", rest),
                };
                let names: Vec<_> = names.split(',').map(str::trim).filter(|n| !n.is_empty()).collect();
                let name = |n: &&str| n.strip_prefix('$').map(str::to_owned);
                let (key, value) = match names.as_slice() {
                    [] => (None, None),
                    [value] => (None, name(value)),
                    [key, value] => (name(key), name(value)),
                    _ => return Err((line, "range takes a key and a value at most".to_owned())),
                };
                let over = pipeline(line, over)?;
                let (body, otherwise) = body(pieces, defined, line)?;
                list.push(Node::Range(line, Loop { key, value, over, body, otherwise }));
            }
            "define" if top => {
                let name = name(line, rest)?.0;
                let (body, _) = body(pieces, defined, line)?;
                defined.push((name, body));
            }
            "template" => {
                let (name, rest) = name(line, rest)?;
                list.push(Node::Template(line, name, pipeline(line, rest)?));
            }
            _ => list.push(Node::Output(line, pipeline(line, &action)?)),
        }
    }
    Ok((list, None))
}

fn name(line: usize, text: &str) -> Result<(String, &str), Problem> {
    let quoted = text.strip_prefix('"').and_then(|rest| rest.split_once('"'));
    quoted
        .map(|(name, rest)| (name.to_owned(), rest.trim()))
        .ok_or_else(|| (line, format!("expected a name in double quotes, found `{text}`")))
}

/// The body of a block with its `else`, up to `end`.
fn body(
    pieces: &mut Pieces,
    defined: &mut Vec<(String, Vec<Node>)>,
    line: usize,
) -> Result<(Vec<Node>, Vec<Node>), Problem> {
    let unfinished = || (line, "the block has no `end`".to_owned());
    let (body, end) = nodes(pieces, defined, false)?;
    let (at, word) = end.ok_or_else(unfinished)?;
    match word.as_str() {
        "end" => Ok((body, Vec::new())),
        "else" => match nodes(pieces, defined, false)? {
            (otherwise, Some((_, word))) if word == "end" => Ok((body, otherwise)),
            (_, Some((line, word))) => Err((line, format!("expected `end`, found `{word}`"))),
            (_, None) => Err(unfinished()),
        },
        _ => Err((at, format!("`{word}` belongs to `if` only"))),
    }
}

fn condition(
    pieces: &mut Pieces,
    defined: &mut Vec<(String, Vec<Node>)>,
    line: usize,
    first: &str,
) -> Result<Node, Problem> {
    let mut branches = Vec::new();
    let mut test = pipeline(line, first)?;
    loop {
        let (body, end) = nodes(pieces, defined, false)?;
        branches.push((test, body));
        let (at, word) = end.ok_or_else(|| (line, "`if` has no `end`".to_owned()))?;
        if word == "end" {
            return Ok(Node::If(line, branches, Vec::new()));
        }
        let after = word.strip_prefix("else").unwrap_or_default().trim();
        if let Some(next) = after.strip_prefix("if ") {
            test = pipeline(at, next)?;
            continue;
        }
        return match nodes(pieces, defined, false)? {
            (otherwise, Some((_, word))) if word == "end" => Ok(Node::If(line, branches, otherwise)),
            _ => Err((at, "`else` has no `end`".to_owned())),
        };
    }
}

/// Reads a pipeline from its text.
fn pipeline(line: usize, text: &str) -> Result<Pipeline, Problem> {
    let mut rest = text;
    let read = commands(line, &mut rest, false)?;
    Ok(read)
}

fn commands(line: usize, rest: &mut &str, inside: bool) -> Result<Pipeline, Problem> {
    let mut list = vec![Vec::new()];
    loop {
        *rest = rest.trim_start();
        let Some(first) = rest.chars().next() else {
            if inside {
                return Err((line, "`(` without `)`".to_owned()));
            }
            break;
        };
        let operand = match first {
            '|' => {
                *rest = &rest[1..];
                list.push(Vec::new());
                continue;
            }
            ')' if inside => {
                *rest = &rest[1..];
                break;
            }
            '(' => {
                *rest = &rest[1..];
                Operand::Group(commands(line, rest, true)?)
            }
            '"' => Operand::Text(quoted(line, rest)?),
            _ => {
                let end = rest.find(|c: char| c.is_whitespace() || "|()\"".contains(c));
                let (word, after) = rest.split_at(end.unwrap_or(rest.len()));
                *rest = after;
                operand(line, word)?
            }
        };
        if let Some(command) = list.last_mut() {
            command.push(operand);
        }
    }
    if list.iter().any(Vec::is_empty) {
        return Err((line, "an action or a part of a pipeline is empty".to_owned()));
    }
    Ok(list)
}

fn quoted(line: usize, rest: &mut &str) -> Result<String, Problem> {
    let mut text = String::new();
    let mut chars = rest.char_indices().skip(1);
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => {
                *rest = &rest[at + 1..];
                return Ok(text);
            }
            '\\' => match chars.next() {
                Some((_, 'n')) => text.push('\n'),
                Some((_, other)) => text.push(other),
                None => break,
            },
            other => text.push(other),
        }
    }
    Err((line, "a text has no closing quote".to_owned()))
}

fn operand(line: usize, word: &str) -> Result<Operand, Problem> {
    let parts = |path: &str| path.split('.').filter(|p| !p.is_empty()).map(str::to_owned).collect::<Vec<_>>();
    if let Some(path) = word.strip_prefix('.') {
        return Ok(Operand::Field(parts(path)));
    }
    if let Some(variable) = word.strip_prefix('$') {
        let (name, path) = variable.split_once('.').unwrap_or((variable, ""));
        return Ok(Operand::Variable(name.to_owned(), parts(path)));
    }
    if let Ok(number) = word.parse() {
        return Ok(Operand::Number(number));
    }
    match word {
        "true" => Ok(Operand::Bool(true)),
        "false" => Ok(Operand::Bool(false)),
        _ if word.chars().all(char::is_alphanumeric) => Ok(Operand::Function(word.to_owned())),
        _ => Err((line, format!("`{word}` is not understood"))),
    }
}
