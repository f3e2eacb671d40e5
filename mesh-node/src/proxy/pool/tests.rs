use super::*;

#[derive(Clone)]
struct FakeTunnel {
    id: usize,
    open: Rc<Cell<bool>>,
    max: usize,
}

impl Tunnel for FakeTunnel {
    fn max_streams(&self) -> usize {
        self.max
    }
    fn is_open(&self) -> bool {
        self.open.get()
    }
}

fn key(port: u16) -> Key {
    Key {
        source: SpiffeId::new("", "a", "b"),
        expected: vec![SpiffeId::new("", "c", "d")],
        destination: SocketAddr::from(([10, 0, 0, 1], port)),
        source_ip: None,
    }
}

struct Dialler {
    pool: Pool<FakeTunnel, &'static str>,
    dials: Rc<Cell<usize>>,
    peer_max: usize,
}

impl Dialler {
    fn new(max_streams: usize) -> Self {
        Self { pool: Pool::new(max_streams), dials: Rc::default(), peer_max: 1000 }
    }

    async fn take(&self, key: &Key) -> Lease<FakeTunnel> {
        self.pool
            .checkout(key, || {
                let (dials, max) = (Rc::clone(&self.dials), self.peer_max);
                async move {
                    tokio::task::yield_now().await;
                    dials.set(dials.get() + 1);
                    Ok(FakeTunnel { id: dials.get(), open: Rc::new(Cell::new(true)), max })
                }
            })
            .await
            .unwrap()
    }
}

fn local<F: Future>(test: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test)
}

#[test]
fn streams_to_one_peer_share_a_tunnel_until_one_more_would_reach_the_limit() {
    local(async {
        let dialler = Dialler::new(4);
        let leases = [
            dialler.take(&key(1)).await,
            dialler.take(&key(1)).await,
            dialler.take(&key(1)).await,
            dialler.take(&key(1)).await,
        ];
        assert_eq!(leases.iter().map(|l| l.tunnel().id).collect::<Vec<_>>(), [1, 1, 1, 2]);
    });
}

#[test]
fn the_peers_limit_holds_when_it_is_the_smaller_one() {
    local(async {
        let mut dialler = Dialler::new(100);
        dialler.peer_max = 3;
        let _leases = [dialler.take(&key(1)).await, dialler.take(&key(1)).await, dialler.take(&key(1)).await];
        assert_eq!(dialler.dials.get(), 2);
    });
}

#[test]
fn a_key_that_differs_in_anything_has_its_own_tunnel() {
    local(async {
        let dialler = Dialler::new(100);
        let base = key(1);
        let others = [
            key(2),
            Key { source: SpiffeId::new("", "x", "y"), ..base.clone() },
            Key { expected: vec![], ..base.clone() },
            Key { source_ip: Some([10, 0, 0, 9].into()), ..base.clone() },
        ];
        let _first = dialler.take(&base).await;
        for (n, other) in others.iter().enumerate() {
            let _lease = dialler.take(other).await;
            assert_eq!(dialler.dials.get(), n + 2);
        }
    });
}

#[test]
fn many_at_once_wait_for_one_dial() {
    local(async {
        let dialler = Dialler::new(100);
        let key = key(1);
        let leases = futures_util::future::join_all((0..50).map(|_| dialler.take(&key))).await;
        assert_eq!((leases.len(), dialler.dials.get()), (50, 1));
    });
}

#[test]
fn a_failed_dial_fails_all_that_waited_for_it_and_none_that_come_later() {
    local(async {
        let dialler = Dialler::new(100);
        let key = key(1);
        let failing = || async {
            tokio::task::yield_now().await;
            Err("refused")
        };
        let failed =
            futures_util::future::join_all((0..5).map(|_| dialler.pool.checkout(&key, failing))).await;
        assert!(failed.iter().all(|r| matches!(r, Err("refused"))));
        assert_eq!(dialler.take(&key).await.tunnel().id, 1);
    });
}

#[test]
fn a_client_that_gives_up_while_dialling_leaves_the_tunnel_to_the_next() {
    local(async {
        let dialler = Dialler::new(100);
        let key = key(1);
        {
            let mut first = Box::pin(dialler.take(&key));
            assert!(futures_util::poll!(&mut first).is_pending());
        }
        let _lease = dialler.take(&key).await;
        assert_eq!(dialler.dials.get(), 1);
    });
}

#[test]
fn a_closed_tunnel_is_not_offered() {
    local(async {
        let dialler = Dialler::new(100);
        let first = dialler.take(&key(1)).await;
        first.tunnel().open.set(false);
        assert_eq!(dialler.take(&key(1)).await.tunnel().id, 2);
    });
}

#[test]
fn a_tunnel_is_released_once_it_had_no_stream_for_the_idle_time() {
    local(async {
        let dialler = Dialler::new(100);
        let idle = Duration::from_secs(300);
        let lease = dialler.take(&key(1)).await;
        let later = Instant::now() + Duration::from_secs(301);
        dialler.pool.release(later, idle);
        assert_eq!(dialler.pool.size(), (1, 1), "it has a stream");
        drop(lease);
        dialler.pool.release(Instant::now(), idle);
        assert_eq!(dialler.pool.size(), (1, 0), "it was used just now");
        dialler.pool.release(Instant::now() + idle, idle);
        assert_eq!(dialler.pool.size(), (0, 0));
    });
}

#[test]
fn the_fullest_tunnel_with_room_is_taken_so_that_others_run_empty() {
    local(async {
        let dialler = Dialler::new(4);
        let mut leases = Vec::new();
        for _ in 0..4 {
            leases.push(dialler.take(&key(1)).await);
        }
        leases.remove(0);
        // Tunnel 1 has two streams, tunnel 2 one.
        assert_eq!(dialler.take(&key(1)).await.tunnel().id, 1);
    });
}

#[test]
fn of_the_tunnels_that_a_wave_needed_one_stays() {
    local(async {
        let dialler = Dialler::new(4);
        let mut leases = Vec::new();
        for _ in 0..9 {
            leases.push(dialler.take(&key(1)).await);
        }
        assert_eq!(dialler.pool.size(), (3, 9));
        let idle = Duration::from_secs(300);
        let later = Instant::now() + Duration::from_secs(3);
        dialler.pool.release(later, idle);
        assert_eq!(dialler.pool.size(), (3, 9), "all have streams");
        drop(leases.drain(..));
        dialler.pool.release(Instant::now(), idle);
        assert_eq!(dialler.pool.size(), (3, 0), "another wave may follow at once");
        dialler.pool.release(later, idle);
        assert_eq!(dialler.pool.size(), (1, 0));
        dialler.pool.release(later, idle);
        assert_eq!(dialler.pool.size(), (1, 0), "the last one stays for as long as it is told");
    });
}

#[test]
fn an_empty_tunnel_beside_a_full_one_stays() {
    local(async {
        let dialler = Dialler::new(4);
        let mut leases = Vec::new();
        for _ in 0..4 {
            leases.push(dialler.take(&key(1)).await);
        }
        drop(leases.pop());
        dialler.pool.release(Instant::now() + Duration::from_secs(3), Duration::from_secs(300));
        assert_eq!(dialler.pool.size(), (2, 3), "the next stream needs it");
        drop(leases.pop());
        dialler.pool.release(Instant::now() + Duration::from_secs(3), Duration::from_secs(300));
        assert_eq!(dialler.pool.size(), (1, 2), "the other one has room now");
    });
}
