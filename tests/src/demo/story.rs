//! How the demo speaks: chapters, sentences, and claims that are checked.

use std::io::IsTerminal;

/// What was told so far.
#[derive(Default)]
pub(super) struct Story {
    chapters: u32,
    claims: Vec<(String, Option<String>)>,
}

fn colour(code: &str, text: &str) -> String {
    if std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        format!("\u{1b}[{code}m{text}\u{1b}[0m")
    } else {
        text.to_owned()
    }
}

impl Story {
    /// Begins a chapter.
    pub(super) fn chapter(&mut self, title: &str) {
        self.chapters += 1;
        println!("\n{}", colour("1", &format!("{}. {title}", self.chapters)));
    }

    /// Says a sentence.
    pub(super) fn say(&self, text: &str) {
        println!("  {text}");
    }

    /// Shows something as it is.
    pub(super) fn show(&self, text: &str) {
        println!("{}", colour("36", text.trim_matches('\n')));
    }

    /// Makes a claim that was just checked; `why` explains one that does not hold.
    pub(super) fn claim(&mut self, text: &str, holds: bool, why: &str) {
        let mark = if holds { colour("32", "  ok ") } else { colour("31", "  NO ") };
        println!("{mark} {text}{}", if holds { String::new() } else { format!(": {why}") });
        self.claims.push((text.to_owned(), (!holds).then(|| why.to_owned())));
    }

    /// Sums up; whether every claim held.
    pub(super) fn summary(&self) -> bool {
        println!("\n{}", colour("1", "Summary"));
        for (text, problem) in &self.claims {
            match problem {
                None => println!("{} {text}", colour("32", "  ok ")),
                Some(why) => println!("{} {text}: {why}", colour("31", "  NO ")),
            }
        }
        let failed = self.claims.iter().filter(|(_, problem)| problem.is_some()).count();
        println!("{} of {} claims held", self.claims.len() - failed, self.claims.len());
        failed == 0
    }
}
