//! The short form of the soak run.

use super::{Scenario, scenario};
use crate::soak::{Plan, soak};
use anyhow::Result;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[scenario(
    "under mixed load with churn of pods, policies and certificates, nothing fails and nothing grows",
    240,
    short,
)];

fn short() -> Result<()> {
    let plan = Plan { warm_up: 2, rounds: 4, round: Duration::from_secs(6), secret_ttl: "130s" };
    soak(&plan, |_| ())
}
