//! Which fields of the APIs have an effect, where, and which test shows it: `docs/api`.
//!
//! Nothing of that is written by hand. The fields are those that the readers' types have; whether one has an effect is what
//! the control plane says in its conditions about examples that have it. Only the tests are named here, and a test checks
//! that they exist.

mod pages;
mod shown;

use std::collections::{BTreeMap, BTreeSet};

use regex::Regex;
use serde_json::Value;

pub use pages::pages;

use crate::convert::{Captured, Mesh, convert};
use crate::model::{Condition, Kind, ObjectRef, Objects, read};
use crate::source::dir::Loader;
use crate::tree::documents;

/// What the examples are about.
const WORLD: &str = include_str!("fields/world.yaml");
/// An object or more of each kind; between them they have every field.
const EXAMPLES: &[(Kind, &str)] = &[
    (Kind::AuthorizationPolicy, include_str!("fields/examples/AuthorizationPolicy.yaml")),
    (Kind::DestinationRule, include_str!("fields/examples/DestinationRule.yaml")),
    (Kind::Gateway, include_str!("fields/examples/Gateway.yaml")),
    (Kind::GatewayClass, include_str!("fields/examples/GatewayClass.yaml")),
    (Kind::IstioGateway, include_str!("fields/examples/IstioGateway.yaml")),
    (Kind::GRPCRoute, include_str!("fields/examples/GRPCRoute.yaml")),
    (Kind::HTTPRoute, include_str!("fields/examples/HTTPRoute.yaml")),
    (Kind::PeerAuthentication, include_str!("fields/examples/PeerAuthentication.yaml")),
    (Kind::ReferenceGrant, include_str!("fields/examples/ReferenceGrant.yaml")),
    (Kind::RequestAuthentication, include_str!("fields/examples/RequestAuthentication.yaml")),
    (Kind::ServiceEntry, include_str!("fields/examples/ServiceEntry.yaml")),
    (Kind::TCPRoute, include_str!("fields/examples/TCPRoute.yaml")),
    (Kind::Telemetry, include_str!("fields/examples/Telemetry.yaml")),
    (Kind::TLSRoute, include_str!("fields/examples/TLSRoute.yaml")),
    (Kind::VirtualService, include_str!("fields/examples/VirtualService.yaml")),
    (Kind::WorkloadEntry, include_str!("fields/examples/WorkloadEntry.yaml")),
];
/// Other spellings that are read.
const ALIASES: [&str; 1] = ["http2Keepalive"];
/// Parts that a reader's types share and that the API does not have there: the reader refuses them.
const NOT_OF_THE_API: &[(Kind, &str)] = &[
    (Kind::GRPCRoute, "filters[].cors"),
    (Kind::GRPCRoute, "filters[].externalAuth"),
    (Kind::GRPCRoute, "filters[].requestRedirect"),
    (Kind::GRPCRoute, "filters[].urlRewrite"),
    (Kind::GRPCRoute, "backendRef.filters"),
    (Kind::GRPCRoute, "backendRef.weight"),
    (Kind::HTTPRoute, "backendRef.filters"),
    (Kind::HTTPRoute, "backendRef.weight"),
    (Kind::TCPRoute, "backendRefs[].filters"),
    (Kind::TCPRoute, "spec.hostnames"),
    (Kind::TLSRoute, "backendRefs[].filters"),
    (Kind::VirtualService, "tcp[].match[].sniHosts"),
    (Kind::VirtualService, "tcp[].route[].headers"),
    (Kind::VirtualService, "tls[].match[].sourceSubnet"),
    (Kind::VirtualService, "tls[].route[].headers"),
];

/// Whether a field has an effect somewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Effect {
    /// It has.
    Yes,
    /// It has, but for some values, for this reason.
    Partly(String),
    /// It has none; the reason may be empty.
    No(String),
    /// No example has it.
    Untold,
}

/// A field and its effect by role.
struct Field {
    path: String,
    roles: BTreeMap<&'static str, Effect>,
}

const ROLES: [&str; 3] = ["node", "waypoint", "gateway"];

/// An example and what the control plane says of it.
struct Example {
    object: Value,
    roles: Vec<&'static str>,
    /// Fields without effect.
    without: Vec<Told>,
    /// It is there for what it is refused for.
    refused: bool,
}

/// What is said of a field without effect.
struct Told {
    path: String,
    why: String,
    /// Whatever its value; else a reason is about the value that it has.
    whole: bool,
}

/// The fields of a kind in the order of their paths.
///
/// # Errors
/// An example is no object, or is refused.
fn fields(kind: Kind, yaml: &str) -> Result<Vec<Field>, String> {
    let examples = examples(kind, yaml)?;
    let known = read::fields(kind);
    let known = known.iter().filter(|path| path.starts_with("spec.") && is_shown(kind, path));
    let mut fields: Vec<Field> = Vec::new();
    for path in known {
        let mut roles: BTreeMap<&'static str, Effect> = BTreeMap::new();
        for example in examples.iter().filter(|example| example.tells_of(path)) {
            let effect = example.effect(path);
            for role in &example.roles {
                let merged = match roles.remove(role) {
                    None => effect.clone(),
                    Some(before) => merge(before, effect.clone()),
                };
                roles.insert(role, merged);
            }
        }
        if roles.is_empty() {
            let of_kind: BTreeSet<&str> = examples.iter().flat_map(|e| e.roles.iter().copied()).collect();
            roles.extend(of_kind.into_iter().map(|role| (role, Effect::Untold)));
        }
        fields.push(Field { path: path.clone(), roles });
    }
    // A part of a policy means the same wherever the policy stands.
    let mut parts: BTreeMap<String, BTreeMap<&'static str, Effect>> = BTreeMap::new();
    for field in fields.iter().filter(|field| !field.is_untold()) {
        let Some(part) = shown::part(kind, &field.path) else { continue };
        let all = parts.entry(part.to_owned()).or_default();
        for (role, effect) in &field.roles {
            let merged = all.remove(role).map_or(effect.clone(), |before| merge(before, effect.clone()));
            all.insert(role, merged);
        }
    }
    for field in &mut fields {
        if let Some(roles) = shown::part(kind, &field.path).and_then(|part| parts.get(part)) {
            field.roles.clone_from(roles);
        }
    }
    Ok(fields)
}

/// Lists and mappings are shown by what holds them.
fn is_shown(kind: Kind, path: &str) -> bool {
    let last = path.rsplit('.').next().unwrap_or_default();
    let alias = path.split('.').any(|step| step.contains('_') || ALIASES.contains(&step));
    let other = NOT_OF_THE_API.iter().any(|(of, part)| *of == kind && path.contains(part));
    !path.ends_with("[]") && last != "{}" && !alias && !other
}

fn merge(one: Effect, other: Effect) -> Effect {
    match (one, other) {
        (Effect::Yes, Effect::Yes) => Effect::Yes,
        (Effect::Yes, Effect::No(why) | Effect::Partly(why))
        | (Effect::No(why) | Effect::Partly(why), Effect::Yes) => Effect::Partly(why),
        (Effect::Untold, known) | (known, _) => known,
    }
}

fn examples(kind: Kind, yaml: &str) -> Result<Vec<Example>, String> {
    let files = [("world.yaml", WORLD), ("example.yaml", yaml)];
    let files = files.map(|(name, text)| (name.to_owned(), Ok(text.to_owned())));
    let state = Loader::new("istio-system")
        .load(files.into_iter().collect())
        .ok_or_else(|| format!("the examples of {kind} were not read"))?;
    let conditions = conditions(&state.objects);
    let mut all = Vec::new();
    for document in documents(yaml) {
        let object =
            document.map_err(|error| format!("an example of {kind} is no YAML: {error:?}"))?.to_json();
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let given = object["metadata"]["annotations"]["roles"].as_str().unwrap_or_default();
        let roles = ROLES.into_iter().filter(|role| given.contains(role)).collect();
        let is_it = |of: &ObjectRef| of.kind == kind && of.key.name == name;
        let problems = state.problems.iter().filter(|problem| problem.object.as_ref().is_none_or(is_it));
        let refused: Vec<Told> = problems
            .map(|problem| Told {
                path: without_indices(&problem.field),
                why: format!("refused: {}", problem.message),
                whole: true,
            })
            .collect();
        // An object that is to be refused says so, and counts for what it is refused for only.
        let meant = object["metadata"]["annotations"]["refused"].is_string();
        let about = conditions.iter().filter(|c| is_it(&c.object)).map(|condition| &*condition.message);
        let mut without: Vec<Told> = about
            .flat_map(|message| if meant { of_the_object(message) } else { without_effect(message) })
            .collect();
        without.iter_mut().for_each(|told| told.name_the_field(&object));
        let unmeant = refused.first().filter(|_| !meant).map(|told| format!("{}: {}", told.path, told.why));
        without.extend(refused);
        let wrong = unmeant.or_else(|| (meant && without.is_empty()).then(|| "it is accepted".to_owned()));
        if let Some(wrong) = wrong {
            return Err(format!("example {name} of {kind}: {wrong}"));
        }
        all.push(Example { roles, without, object, refused: meant });
    }
    Ok(all)
}

fn conditions(objects: &Objects) -> Vec<Condition> {
    convert(objects, &Mesh::default().with_settings(objects), &Captured::new()).conditions
}

/// The fields that a condition speaks of, with the reasons that it gives. Conditions name fields only to say that they
/// have no effect.
fn without_effect(message: &str) -> Vec<Told> {
    let Ok(pattern) = Regex::new(
        r"(?:spec\.|\b)((?:[a-z][A-Za-z0-9]*(?:\[\d+\])?\.)*[a-z][A-Za-z0-9]*(?:\[[^\]]*\])?)(?: \(([^)]*)\))?",
    ) else {
        return Vec::new();
    };
    let marks = ["no effect: ", "part of the mesh: ", "cannot be applied: ", "nodes cannot evaluate "];
    let Some((_, listed)) = marks.iter().find_map(|mark| message.split_once(mark)) else { return Vec::new() };
    let found = pattern.captures_iter(listed).filter_map(|found| {
        let path = found.get(1)?.as_str();
        let of_rules = path.contains('.') || found.get(0)?.as_str().starts_with("spec.");
        let why = found.get(2).map(|why| why.as_str().to_owned()).unwrap_or_default();
        of_rules.then(|| Told { path: format!("spec.{}", without_indices(path)), why, whole: false })
    });
    found.collect()
}

/// The field for which an object as a whole has no effect.
fn of_the_object(message: &str) -> Vec<Told> {
    let told = |path: String, why: &str| {
        vec![Told { path, why: format!("the object has no effect: {why}"), whole: true }]
    };
    if let Some((field, rest)) = message.strip_prefix("spec.").and_then(|rest| rest.split_once(' ')) {
        return told(format!("spec.{}", without_indices(field.trim_end_matches(':'))), rest);
    }
    let selector = message.strip_prefix("has a selector, ");
    selector.map(|rest| told("spec.selector".to_owned(), rest)).unwrap_or_default()
}

fn without_indices(path: &str) -> String {
    let mut text = String::new();
    let mut inside = false;
    for character in path.chars() {
        inside = character == '[' || inside && character != ']';
        if character == '[' || !inside {
            text.push(character);
        }
    }
    text
}

impl Told {
    /// A reason that begins with the name of a field is about that one.
    fn name_the_field(&mut self, object: &Value) {
        let (name, rest) = self.why.split_once(' ').unwrap_or((&self.why, ""));
        // Names of kinds of filters begin with a capital.
        let mut field =
            if name.chars().all(char::is_uppercase) { name.to_lowercase() } else { name.to_owned() };
        if let Some(first) = field.get_mut(..1) {
            first.make_ascii_lowercase();
        }
        let candidates = [format!("{}.{field}", self.path), format!("{}[].{field}", self.path)];
        if let Some(inner) = candidates.into_iter().find(|inner| has(object, inner)) {
            (self.path, self.why, self.whole) = (inner, rest.to_owned(), true);
        }
    }
}

impl Example {
    fn tells_of(&self, path: &str) -> bool {
        let of_it = |told: &Told| is_within(path, &told.path);
        has(&self.object, path) && (!self.refused || self.without.iter().any(of_it))
    }

    fn effect(&self, path: &str) -> Effect {
        let mut effect = Effect::Yes;
        for told in self.without.iter().filter(|told| is_within(path, &told.path)) {
            match told.why.is_empty() || told.whole {
                true => return Effect::No(told.why.clone()),
                false if path == told.path => effect = Effect::Partly(told.why.clone()),
                false => {}
            }
        }
        effect
    }
}

/// Whether a path is another or below it; `{}` is any key.
fn is_within(path: &str, of: &str) -> bool {
    let (mut path, of) = (path.split('.'), of.split('.'));
    for step in of {
        match path.next() {
            Some(own) if own == "{}" || own == step || own.trim_end_matches("[]") == step => {}
            _ => return false,
        }
    }
    true
}

/// Whether an object has a field.
fn has(object: &Value, path: &str) -> bool {
    match path.split_once('.') {
        None => !step_into(object, path).is_empty(),
        Some((step, rest)) => step_into(object, step).iter().any(|value| has(value, rest)),
    }
}

/// The values behind one step of a path.
fn step_into<'v>(object: &'v Value, step: &str) -> Vec<&'v Value> {
    let name = step.trim_end_matches("[]");
    let values: Vec<&Value> = match (name, object) {
        ("{}", Value::Object(map)) => map.values().collect(),
        (name, object) => object.get(name).into_iter().collect(),
    };
    if !step.ends_with("[]") {
        return values;
    }
    values.into_iter().filter_map(Value::as_array).flatten().collect()
}
