//! A peer: another process with the same database open, which does what it is told on its standard input, line by line.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use seeknal_state::{
    ClaimFilter, Coordinator, Error, Lease, LeaseKey, LockOptions, NewRun, NodeUpdate, RunId, Version, create_state_backend,
};

use super::support::Place;

const PLACE: &str = "SEEKNAL_TEST_PEER";
/// Marks the answers among what the test harness prints.
const MARK: &str = ">> ";
/// What it says between the pieces of a long order: it works.
const WORKS: &str = "works";
/// From one word of it to the next; for a broken build only.
const PATIENCE: Duration = Duration::from_secs(60);

/// A process that has the database open.
pub(crate) struct Peer {
    child: Child,
    orders: ChildStdin,
    answers: Receiver<String>,
}

impl Peer {
    /// Starts a process that opens this database.
    pub(crate) fn start(place: &Place) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["peer::acts_as_a_peer", "--exact", "--nocapture", "--test-threads=1"])
            .env(PLACE, serde_json::to_string(place).unwrap())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (orders, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Some((_, answer)) = line.split_once(MARK)
                    && sender.send(answer.to_owned()).is_err()
                {
                    return;
                }
            }
        });
        let mut peer = Self { child, orders, answers };
        assert_eq!(peer.answer(), "open");
        peer
    }

    /// Tells it to do something, without waiting for it.
    pub(crate) fn tell(&mut self, order: &str) {
        writeln!(self.orders, "{order}").unwrap();
    }

    pub(crate) fn answer(&mut self) -> String {
        loop {
            let answer = self.answers.recv_timeout(PATIENCE).expect("the peer says nothing");
            if answer != WORKS {
                return answer;
            }
        }
    }

    pub(crate) fn ask(&mut self, order: &str) -> String {
        self.tell(order);
        self.answer()
    }

    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap();
        assert!(status.success(), "kill {name}");
    }

    /// Ends it as the system does when memory is short.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Also one that was stopped.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// The other side. Without the variable this is no test at all.
#[test]
fn acts_as_a_peer() {
    let Ok(place) = std::env::var(PLACE) else { return };
    let place: Place = serde_json::from_str(&place).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let backend = create_state_backend("database", &place.options()).unwrap();
    let state = runtime.block_on(Coordinator::open(backend)).unwrap();
    say("open");
    let mut lease = None;
    for order in std::io::stdin().lines() {
        let order = order.unwrap();
        let words: Vec<&str> = order.split(' ').collect();
        say(&runtime.block_on(obey(&state, &mut lease, &words)));
    }
    runtime.block_on(state.close()).unwrap();
}

fn say(text: &str) {
    println!("{MARK}{text}");
}

async fn obey(state: &Coordinator, held: &mut Option<Lease>, words: &[&str]) -> String {
    let number = |text: &str| text.parse::<u64>().unwrap();
    match words {
        // Takes a lock on a run: for how long it lasts, and how long to wait, in milliseconds.
        ["lock", run, ttl, wait] => {
            let options = LockOptions::new().ttl(Duration::from_millis(number(ttl)));
            let key = LeaseKey::run(RunId::new(run).unwrap());
            match state.acquire(key, options, Duration::from_millis(number(wait))).await.unwrap() {
                Some(lease) => {
                    let token = lease.token();
                    *held = Some(lease);
                    format!("locked {token}")
                }
                None => "taken".to_owned(),
            }
        }
        ["release"] => {
            held.take().unwrap().release().await.unwrap();
            "released".to_owned()
        }
        // Writes under the lock, whatever this process believes of it.
        ["fenced", run, node] => {
            let fenced = state.with_lease(held.as_ref().unwrap());
            match fenced.set_node_state(*run, *node, NodeUpdate::success()).await {
                Ok(_) => "written".to_owned(),
                Err(error) => format!("refused: {error}"),
            }
        }
        // Writes a node so often, one write after another.
        ["write", run, node, count] => {
            for row in 1..=number(count) {
                state.set_node_state(*run, *node, NodeUpdate::running().row_count(row)).await.unwrap();
                say(WORKS);
            }
            "written".to_owned()
        }
        // Writes a node once.
        ["row", run, node, row] => {
            state.set_node_state(*run, *node, NodeUpdate::running().row_count(number(row))).await.unwrap();
            "written".to_owned()
        }
        // Makes a run with so many nodes that wait for workers.
        ["plan", run, count] => {
            let mut tx = state.transaction();
            tx.create_run(*run, NewRun::running());
            for node in 0..number(count) {
                tx.set_node_state(*run, format!("n{node}"), NodeUpdate::pending());
            }
            tx.commit().await.unwrap();
            "planned".to_owned()
        }
        // Claims a node, and works on it until it is killed.
        ["hold", run] => {
            let next = state.claim_next(*run, ClaimFilter::new().wait(PATIENCE)).await.unwrap();
            std::mem::forget(next);
            "held".to_owned()
        }
        // Writes a node if the run is at this version.
        ["guarded", run, node, version, row] => {
            let mut tx = state.transaction();
            tx.expect_version(*run, Version(number(version)));
            tx.set_node_state(*run, *node, NodeUpdate::running().row_count(number(row)));
            match tx.commit().await {
                Ok(_) => "won".to_owned(),
                Err(Error::Conflict(_)) => "lost".to_owned(),
                Err(error) => format!("{error:?}"),
            }
        }
        // Raises the number of a node in two runs at once, so often; says how often somebody else was faster for good.
        ["raise", first, second, node, count] => {
            let mut conflicts = 0;
            let mut left = number(count);
            while left > 0 {
                let raised = state
                    .transact(|view, tx| {
                        for run in [*first, *second] {
                            let before = view.run(run)?.and_then(|run| run.node(node)?.row_count).unwrap_or(0);
                            tx.set_node_state(run, *node, NodeUpdate::running().row_count(before + 1));
                        }
                        Ok(())
                    })
                    .await;
                match raised {
                    Ok(_) => left -= 1,
                    Err(Error::Conflict(_)) => conflicts += 1,
                    Err(error) => return format!("{error:?}"),
                }
                say(WORKS);
            }
            format!("raised, {conflicts} conflicts")
        }
        // Writes a node in two runs at once, guarded on the version of each.
        ["both", first, second, node, versions, row] => {
            let mut tx = state.transaction();
            for (run, version) in [*first, *second].into_iter().zip(versions.split(',')) {
                tx.expect_version(run, Version(number(version)));
                tx.set_node_state(run, *node, NodeUpdate::running().row_count(number(row)));
            }
            match tx.commit().await {
                Ok(_) => "won".to_owned(),
                Err(Error::Conflict(_)) => "lost".to_owned(),
                Err(error) => format!("{error:?}"),
            }
        }
        other => panic!("what is {other:?}?"),
    }
}
