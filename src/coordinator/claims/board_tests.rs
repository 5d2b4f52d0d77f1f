//! Who is woken in front of a board, and when.

use super::*;
use crate::model::{Mutation, NewRun, NodeStatus, NodeUpdate, RunState, Selection, apply, time};

const WAITERS: usize = 50;
/// A node is left to others for less than this where claims take no time.
const ITS_TIME: Duration = Duration::from_millis(40);
const OTHERS: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];

/// A run on which others work too, and those who wait for work here.
struct World {
    /// The run before there was work, to ask who comes first for a node.
    before: RunState,
    state: RunState,
    board: Arc<Board>,
    woken: Arc<AtomicUsize>,
    named: usize,
}

impl World {
    async fn new() -> Self {
        let run = RunId::new("r").unwrap();
        let mut state = None;
        let create = Mutation::Create { run: NewRun::running(), at: time::from_micros(0).unwrap() };
        apply(&mut state, &run, &create, Version(1)).unwrap();
        let mut state = state.unwrap();
        set(&mut state, "busy", NodeUpdate::running());
        let mut me = ProcessInfo::current(time::from_micros(0).unwrap());
        me.id = Arc::from("me");
        let board = Arc::new(Board::new(&snapshot(&state), &wish(), &me, &Handle::current()));
        board.lock().ready.set_peers(OTHERS);
        let woken = Arc::new(AtomicUsize::new(0));
        for _ in 0..WAITERS {
            let (board, woken) = (Arc::clone(&board), Arc::clone(&woken));
            tokio::spawn(async move {
                let _its_own = loop {
                    board.news().await;
                    woken.fetch_add(1, Ordering::SeqCst);
                    if let Some(picked) = board.pick() {
                        break picked;
                    }
                };
                std::future::pending::<()>().await;
            });
        }
        let world = Self { before: state.clone(), state, board, woken, named: 0 };
        world.woken_after(Duration::from_millis(1)).await;
        world
    }

    /// Commits so many nodes more, for all of which others come first; the last one's name.
    fn add(&mut self, nodes: usize) -> String {
        let mut added = Vec::new();
        while added.len() < nodes {
            self.named += 1;
            let name = format!("n{}", self.named);
            let mut alone = self.before.clone();
            set(&mut alone, &name, NodeUpdate::pending());
            let mut ready = ReadyBoard::new(alone, &wish(), "me");
            ready.set_peers(OTHERS);
            if !ready.has_next() {
                set(&mut self.state, &name, NodeUpdate::pending());
                added.push(name);
            }
        }
        self.board.catch_up(&snapshot(&self.state));
        added.pop().unwrap()
    }

    async fn woken_after(&self, time: Duration) -> usize {
        tokio::time::sleep(time).await;
        self.woken.load(Ordering::SeqCst)
    }
}

fn wish() -> Arc<Wish> {
    Arc::new(Wish { done: vec![NodeStatus::Success], nodes: Selection::default() })
}

fn set(state: &mut RunState, node: &str, update: NodeUpdate) {
    let (run, version) = (state.id().clone(), Version(state.version().0 + 1));
    let update = Box::new(update);
    let mutation = Mutation::SetNode { node: NodeId::new(node).unwrap(), update, at: time::from_micros(0).unwrap() };
    let mut changed = Some(state.clone());
    apply(&mut changed, &run, &mutation, version).unwrap();
    *state = changed.unwrap();
}

fn snapshot(state: &RunState) -> Snapshot {
    Snapshot::new(state.clone(), state.version())
}

#[tokio::test(start_paused = true)]
async fn one_of_many_is_woken_for_a_node_when_its_time_comes() {
    let mut world = World::new().await;
    for round in 0..3 {
        world.add(1);
        assert_eq!(world.woken_after(Duration::from_millis(5)).await, round, "it is left to others");
        assert_eq!(world.woken_after(ITS_TIME).await, round + 1);
    }
    world.add(4);
    assert_eq!(world.woken_after(2 * ITS_TIME).await, 7);
    assert!(world.board.pick().is_none(), "each has one who took it");
}

#[tokio::test(start_paused = true)]
async fn nobody_is_woken_for_what_others_took_in_time() {
    let mut world = World::new().await;
    let name = world.add(1);
    set(&mut world.state, &name, NodeUpdate::running());
    world.board.catch_up(&snapshot(&world.state));
    assert_eq!(world.woken_after(ITS_TIME).await, 0);
}
