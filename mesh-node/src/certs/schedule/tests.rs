use super::*;

fn id(n: usize) -> SpiffeId {
    SpiffeId::new("", "shop", &format!("sa{n:02}"))
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
}

fn valid(from: u64, to: u64) -> Validity {
    Validity { not_before: at(from), not_after: at(to) }
}

#[test]
fn a_wanted_identity_is_fetched_once_and_renewed_at_half_of_its_life() {
    let mut schedule = Schedule::default();
    schedule.want(&id(1), Priority::Warmup, at(0));
    assert_eq!(schedule.next(at(0)), Some(id(1)));
    assert_eq!(schedule.next(at(0)), None, "it is being fetched already");
    schedule.succeeded(&id(1), valid(0, 100), at(1));
    assert_eq!(schedule.wake_at(), Some(at(50)));
    assert_eq!(schedule.next(at(49)), None);
    assert_eq!(schedule.next(at(50)), Some(id(1)));
}

#[test]
fn at_most_eight_fetches_run_at_once() {
    let mut schedule = Schedule::default();
    for n in 0..10 {
        schedule.want(&id(n), Priority::Warmup, at(0));
    }
    let running: Vec<_> = std::iter::from_fn(|| schedule.next(at(0))).collect();
    assert_eq!(running.len(), CONCURRENT_FETCHES);
    assert_eq!(schedule.wake_at(), None);
    schedule.succeeded(&running[0], valid(0, 100), at(1));
    assert!(schedule.next(at(1)).is_some());
    assert!(schedule.next(at(1)).is_none());
}

#[test]
fn a_waiting_connection_goes_before_a_new_pod_and_that_before_a_renewal() {
    let mut schedule = Schedule::default();
    schedule.want(&id(1), Priority::Background, at(0));
    schedule.want(&id(2), Priority::Warmup, at(1));
    schedule.want(&id(3), Priority::Warmup, at(2));
    schedule.want(&id(3), Priority::RealTime, at(3));
    let order: Vec<_> = std::iter::from_fn(|| schedule.next(at(4))).collect();
    assert_eq!(order, [id(3), id(2), id(1)]);
}

#[test]
fn failures_back_off_doubling_to_a_limit() {
    let mut schedule = Schedule::default();
    schedule.want(&id(1), Priority::Warmup, at(0));
    let mut now = at(0);
    let mut waits = Vec::new();
    for _ in 0..10 {
        assert_eq!(schedule.next(now), Some(id(1)));
        let due = schedule.failed(&id(1), now, 0.5).unwrap();
        waits.push(due.duration_since(now).unwrap().as_secs());
        now = due;
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 150, 150]);
}

#[test]
fn jitter_moves_a_retry_by_a_fifth_either_way() {
    for (jitter, millis) in [(0.0, 800), (1.0, 1200)] {
        let mut schedule = Schedule::default();
        schedule.want(&id(1), Priority::Warmup, at(0));
        schedule.next(at(0));
        assert_eq!(schedule.failed(&id(1), at(0), jitter), Some(at(0) + Duration::from_millis(millis)));
    }
}

#[test]
fn a_retry_comes_no_later_than_the_expiry_of_the_certificate_in_use() {
    let mut schedule = Schedule::default();
    schedule.want(&id(1), Priority::Warmup, at(0));
    schedule.next(at(0));
    schedule.succeeded(&id(1), valid(0, 100), at(0));
    let mut now = at(50);
    loop {
        assert!(schedule.next(now).is_some());
        now = schedule.failed(&id(1), now, 1.0).unwrap();
        if now >= at(100) {
            break;
        }
    }
    assert_eq!(now, at(100), "one attempt happens at the expiry itself");
    schedule.next(now);
    assert!(schedule.failed(&id(1), now, 0.5).unwrap() > now, "after expiry it backs off as usual");
}

#[test]
fn a_waiting_connection_cuts_a_long_backoff_short_but_makes_no_loop() {
    let mut schedule = Schedule::default();
    schedule.want(&id(1), Priority::Warmup, at(0));
    let mut now = at(0);
    for _ in 0..8 {
        schedule.next(now);
        now = schedule.failed(&id(1), now, 0.5).unwrap();
    }
    schedule.next(now);
    schedule.failed(&id(1), now, 0.5);
    schedule.want(&id(1), Priority::RealTime, now);
    assert_eq!(schedule.wake_at(), Some(now + Duration::from_secs(1)));
    assert_eq!(schedule.next(now), None);
}

#[test]
fn a_forgotten_identity_frees_its_fetch_and_its_late_answer_changes_nothing() {
    let mut schedule = Schedule::default();
    schedule.want(&id(1), Priority::Warmup, at(0));
    schedule.next(at(0));
    schedule.forget(&id(1));
    schedule.succeeded(&id(1), valid(0, 100), at(1));
    assert!(!schedule.wants(&id(1)));
    assert_eq!(schedule.wake_at(), None);
    for n in 0..8 {
        schedule.want(&id(n), Priority::Warmup, at(2));
        assert!(schedule.next(at(2)).is_some());
    }
}

#[test]
fn a_certificate_that_is_past_half_of_its_life_on_arrival_is_not_asked_for_in_a_loop() {
    let mut schedule = Schedule::default();
    schedule.want(&id(1), Priority::Warmup, at(0));
    schedule.next(at(0));
    schedule.succeeded(&id(1), valid(0, 10), at(9));
    assert_eq!(schedule.next(at(9)), None);
    assert_eq!(schedule.wake_at(), Some(at(10)));
}

#[test]
fn what_holds_only_later_is_fetched_at_once_when_the_clock_is_set_back() {
    let mut schedule = Schedule::default();
    for n in 1..=3 {
        schedule.want(&id(n), Priority::Warmup, at(50_000));
        assert_eq!(schedule.next(at(50_000)), Some(id(n)));
    }
    schedule.succeeded(&id(1), valid(50_000, 136_400), at(50_000));
    schedule.succeeded(&id(2), valid(0, 100_000), at(50_000));
    schedule.failed(&id(3), at(50_000), 0.5);
    assert_eq!(schedule.next(at(50_000)), None);
    // A small correction is none of that.
    assert_eq!(schedule.next(at(49_995)), None);
    let mut due = [schedule.next(at(1_000)), schedule.next(at(1_000))];
    due.sort();
    assert_eq!(due, [Some(id(1)), Some(id(3))], "one from the future, one whose retry is in the future");
    assert_eq!(schedule.next(at(1_000)), None, "the second one still holds");
}

#[test]
fn an_authority_whose_clock_is_ahead_is_asked_again_and_not_in_a_loop() {
    let mut schedule = Schedule::default();
    schedule.want(&id(1), Priority::Warmup, at(0));
    assert_eq!(schedule.next(at(0)), Some(id(1)));
    schedule.succeeded(&id(1), valid(600, 87_000), at(0));
    assert_eq!(schedule.next(at(149)), None);
    assert_eq!(schedule.next(at(150)), Some(id(1)));
}
