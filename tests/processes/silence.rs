//! A server behind a network that goes silent for longer than a lock lasts: its holder hears of the end in time, before anybody else has the lock.
#![cfg(any(feature = "libsql", feature = "postgres"))]

use std::sync::Arc;
use std::time::{Duration, Instant};

use seeknal_state::{Coordinator, Error, Lease, LeaseKey, LockOptions, LostReason, NewRun, NodeUpdate, RunId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::stalls::unless_it_stalls;
use super::support::Store;

const NOW: Duration = Duration::ZERO;
const LONG: Duration = Duration::from_secs(60);

/// A network that forwards what it is given. While it is silent it takes everything and passes nothing on; afterwards what was connected is cut off.
struct Network {
    port: u16,
    silent: Arc<watch::Sender<bool>>,
    work: JoinHandle<()>,
}

impl Drop for Network {
    fn drop(&mut self) {
        self.work.abort();
    }
}

impl Network {
    async fn before(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let silent = Arc::new(watch::Sender::new(false));
        let of_lines = Arc::clone(&silent);
        let work = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let silent = of_lines.subscribe();
                tokio::spawn(async move {
                    let Ok(server) = TcpStream::connect(("127.0.0.1", server)).await else { return };
                    let (from_client, to_client) = client.into_split();
                    let (from_server, to_server) = server.into_split();
                    let ways = [(from_client, to_server), (from_server, to_client)].map(|(mut from, mut to)| {
                        let silent = silent.clone();
                        async move {
                            let mut bytes = vec![0; 64 * 1024];
                            let mut was_silent = false;
                            while let Ok(read @ 1..) = from.read(&mut bytes).await {
                                was_silent |= *silent.borrow();
                                // What was lost once is not made whole again.
                                if !was_silent && to.write_all(&bytes[..read]).await.is_err() {
                                    return;
                                }
                            }
                            // A silent network does not say that somebody hung up.
                            let mut silent = silent;
                            let _gone = silent.wait_for(|silent| !silent).await.is_err();
                        }
                    });
                    let mut again = silent;
                    let cut_off = async {
                        let _gone = again.wait_for(|silent| *silent).await.is_err();
                        let _gone = again.wait_for(|silent| !silent).await.is_err();
                    };
                    let [up, down] = ways;
                    tokio::select! {
                        ((), ()) = async { tokio::join!(up, down) } => {}
                        () = cut_off => {}
                    }
                });
            }
        });
        Self { port, silent, work }
    }

    /// The same place, through this network.
    fn to(&self, store: &Store, server: u16) -> super::support::Place {
        let url = store.place.url.as_ref().unwrap();
        let through = url.replace(&format!(":{server}"), &format!(":{}", self.port));
        assert_ne!(*url, through);
        super::support::Place { url: Some(through), ..store.place.clone() }
    }
}

fn port_of(store: &Store) -> u16 {
    let behind = store.place.url.as_ref().unwrap().rsplit_once("127.0.0.1:").unwrap().1;
    behind.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

async fn lock(state: &Coordinator, run: &str, ttl: Duration, wait: Duration) -> Option<Lease> {
    state.acquire(LeaseKey::run(RunId::new(run).unwrap()), LockOptions::new().ttl(ttl), wait).await.unwrap()
}

async fn the_holder_behind_a_silent_network_hears_that_its_lock_is_lost(store: Store) {
    let server = port_of(&store);
    let network = Network::before(server).await;
    let backend = seeknal_state::create_state_backend("database", &network.to(&store, server).options()).unwrap();
    let (cut_off, elsewhere) = (Coordinator::open(backend).await.unwrap(), store.open().await);
    elsewhere.create_run("r", NewRun::running()).await.unwrap();
    unless_it_stalls(store.folder.path(), Duration::from_secs(2), async |ttl| {
        let held = lock(&cut_off, "r", ttl, LONG).await.unwrap();
        // It is kept alive as long as the network is there.
        tokio::time::sleep(ttl / 2).await;
        assert!(lock(&elsewhere, "r", ttl, NOW).await.is_none());
        network.silent.send_replace(true);
        let began = Instant::now();
        let waiting = {
            let elsewhere = elsewhere.clone();
            tokio::spawn(async move { (lock(&elsewhere, "r", ttl, LONG).await.unwrap(), Instant::now()) })
        };
        let why = tokio::time::timeout(LONG, held.lost()).await.expect("never told");
        let told = (began.elapsed(), Instant::now());
        // Whoever holds it has no doubt any more when another one gets it; the storage lets nobody have it earlier.
        let (next, got) = waiting.await.unwrap();
        println!("{ttl:?}: told after {:?}, another one has it {:?} later", told.0, got.saturating_duration_since(told.1));
        assert!(next.token() > held.token(), "{:?} follows {:?}", next.token(), held.token());
        network.silent.send_replace(false);
        assert!(held.is_lost() && held.remaining() == Duration::ZERO);
        let late = cut_off.with_lease(&held).set_node_state("r", "late", NodeUpdate::success()).await;
        assert!(late.as_ref().is_err_and(Error::is_lease_lost), "{late:?}");
        next.release().await.unwrap();
        let again = lock(&cut_off, "r", ttl, LONG).await.unwrap();
        assert!(again.token() > held.token());
        again.release().await.unwrap();
        let why = if why == LostReason::Storage { Ok(()) } else { Err(format!("it is told that it is lost: {why}")) };
        let in_time = |is: bool, what: &str| if is { Ok(()) } else { Err(format!("told after {:?}: {what}", told.0)) };
        why.and(in_time(told.0 <= ttl + Duration::from_secs(1), "later than its TTL"))
            // It was renewed at a third of its TTL, so that at least half of it was left.
            .and(in_time(told.0 >= ttl / 2, "long before its time"))
            .and(in_time(told.1 <= got, "another one had it by then"))
    })
    .await;
    elsewhere.close().await.unwrap();
    cut_off.close().await.unwrap();
}

#[cfg(feature = "postgres")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_postgres() {
    if let Some(store) = Store::on_postgres() {
        the_holder_behind_a_silent_network_hears_that_its_lock_is_lost(store).await;
    }
}

#[cfg(feature = "libsql")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_libsql() {
    if let Some(store) = Store::on_libsql() {
        the_holder_behind_a_silent_network_hears_that_its_lock_is_lost(store).await;
    }
}
