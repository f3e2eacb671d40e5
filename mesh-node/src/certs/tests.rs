use std::cell::{Cell, RefCell};
use std::rc::Rc;

use mesh_core::tls::testing::{Leaf, TestCa};
use mesh_core::tls::{KeyAndCsr, Revocations};

use super::*;

/// An authority that the test can switch off.
struct Fake {
    ca: TestCa,
    away: Rc<Cell<bool>>,
    asked: Rc<RefCell<Vec<SpiffeId>>>,
    lifetime: Duration,
    /// How far its clock is ahead.
    ahead: Rc<Cell<Duration>>,
}

impl Authority for Fake {
    fn fetch(&self, identity: &SpiffeId) -> LocalBoxFuture<'_, Result<WorkloadCertificate, String>> {
        self.asked.borrow_mut().push(identity.clone());
        let identity = identity.clone();
        Box::pin(async move {
            if self.away.get() {
                return Err("the authority is away".to_owned());
            }
            let key = KeyAndCsr::generate(&identity).map_err(|e| e.to_string())?;
            let mut leaf = Leaf::of(&identity);
            leaf.not_before = SystemTime::now() - Duration::from_secs(1) + self.ahead.get();
            leaf.not_after = SystemTime::now() + self.lifetime;
            let chain = self.ca.sign(key.csr_pem(), &leaf);
            WorkloadCertificate::new(key, &chain, &Revocations::default()).map_err(|e| e.to_string())
        })
    }
}

struct Setup {
    certificates: Certificates,
    away: Rc<Cell<bool>>,
    asked: Rc<RefCell<Vec<SpiffeId>>>,
    ahead: Rc<Cell<Duration>>,
}

fn with_store<F: Future<Output = ()>>(lifetime: Duration, test: impl FnOnce(Setup) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (away, asked) = (Rc::new(Cell::new(false)), Rc::default());
    let ahead = Rc::new(Cell::new(Duration::ZERO));
    let fake = Fake {
        ca: TestCa::new(),
        away: Rc::clone(&away),
        asked: Rc::clone(&asked),
        lifetime,
        ahead: Rc::clone(&ahead),
    };
    let (certificates, task) = store(fake);
    tokio::task::LocalSet::new().block_on(&runtime, async {
        tokio::task::spawn_local(task);
        test(Setup { certificates, away, asked, ahead }).await;
    });
}

fn id(name: &str) -> SpiffeId {
    SpiffeId::new("", "shop", name)
}

const DAY: Duration = Duration::from_secs(86_400);
const PATIENCE: Duration = Duration::from_secs(5);

#[test]
fn a_needed_identity_is_fetched_before_anybody_asks() {
    with_store(DAY, |setup| async move {
        let mut changed = setup.certificates.watch();
        setup.certificates.need(BTreeSet::from([id("cart")]));
        changed.changed().await.unwrap();
        assert_eq!(setup.certificates.get(&id("cart")).unwrap().identity(), &id("cart"));
    });
}

#[test]
fn an_identity_that_no_pod_of_the_node_has_is_never_asked_for() {
    with_store(DAY, |setup| async move {
        let error = setup.certificates.wait(&id("root"), Duration::from_millis(50)).await.unwrap_err();
        assert!(matches!(error, CertError::Late { .. }), "{error}");
        assert!(setup.asked.borrow().is_empty());
    });
}

#[test]
fn a_connection_waits_for_the_certificate_and_gets_the_authoritys_reason_if_there_is_none() {
    with_store(DAY, |setup| async move {
        setup.away.set(true);
        setup.certificates.need(BTreeSet::from([id("cart")]));
        let error = setup.certificates.wait(&id("cart"), Duration::from_millis(300)).await.unwrap_err();
        assert!(error.to_string().contains("the authority is away"), "{error}");
        setup.away.set(false);
        assert!(setup.certificates.wait(&id("cart"), PATIENCE).await.is_ok());
    });
}

#[test]
fn a_valid_certificate_stays_in_use_while_the_authority_is_away() {
    with_store(Duration::from_secs(3), |setup| async move {
        setup.certificates.need(BTreeSet::from([id("cart")]));
        let first = setup.certificates.wait(&id("cart"), PATIENCE).await.unwrap();
        setup.away.set(true);
        // Renewal is due after a second, and fails.
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        assert!(setup.asked.borrow().len() >= 2);
        let now = setup.certificates.get(&id("cart")).unwrap();
        assert_eq!(now.serial(), first.serial());
        tokio::time::sleep(Duration::from_millis(2_000)).await;
        let error = setup.certificates.wait(&id("cart"), Duration::from_millis(10)).await.unwrap_err();
        assert!(matches!(error, CertError::Expired { .. }), "{error}");
    });
}

#[test]
fn a_certificate_is_renewed_at_half_of_its_life() {
    with_store(Duration::from_secs(3), |setup| async move {
        setup.certificates.need(BTreeSet::from([id("cart")]));
        let first = setup.certificates.wait(&id("cart"), PATIENCE).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1_700)).await;
        let second = setup.certificates.get(&id("cart")).unwrap();
        assert_ne!(second.serial(), first.serial());
    });
}

#[test]
fn a_certificate_that_holds_only_later_does_not_take_the_place_of_one_that_holds() {
    with_store(Duration::from_secs(4), |setup| async move {
        setup.certificates.need(BTreeSet::from([id("cart")]));
        let first = setup.certificates.wait(&id("cart"), PATIENCE).await.unwrap();
        setup.ahead.set(Duration::from_secs(3));
        // Renewal is due after one and a half seconds.
        tokio::time::sleep(Duration::from_millis(2_200)).await;
        assert!(setup.asked.borrow().len() >= 2);
        assert_eq!(setup.certificates.get(&id("cart")).unwrap().serial(), first.serial());
    });
}

#[test]
fn an_identity_whose_last_pod_left_is_forgotten() {
    with_store(DAY, |setup| async move {
        setup.certificates.need(BTreeSet::from([id("cart")]));
        setup.certificates.wait(&id("cart"), PATIENCE).await.unwrap();
        setup.certificates.need(BTreeSet::from([id("web")]));
        setup.certificates.wait(&id("web"), PATIENCE).await.unwrap();
        assert!(setup.certificates.get(&id("cart")).is_none());
    });
}
