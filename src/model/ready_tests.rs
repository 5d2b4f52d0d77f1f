//! Which nodes are ready, against a naive oracle that looks at all of them after every change.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::model::{Mutation, NewRun, NodeUpdate, RawJson, RunId, apply, time};

const DONE: &[NodeStatus] = &[NodeStatus::Success, NodeStatus::Cached, NodeStatus::Skipped];

fn id(number: usize) -> NodeId {
    NodeId::new(format!("n{number}")).unwrap()
}

struct World {
    state: Option<RunState>,
    version: u64,
}

impl World {
    fn new() -> Self {
        let mut world = Self { state: None, version: 0 };
        world.apply(&Mutation::Create { run: NewRun::running(), at: time::from_micros(0).unwrap() });
        world
    }

    /// With so many nodes, all of them ready.
    fn with_ready(nodes: usize) -> Self {
        let mut world = Self::new();
        assert!((0..nodes).all(|node| world.set(node, NodeUpdate::new())));
        world
    }

    fn apply(&mut self, mutation: &Mutation) -> bool {
        self.version += 1;
        apply(&mut self.state, &RunId::new("r").unwrap(), mutation, Version(self.version)).is_ok()
    }

    fn set(&mut self, node: usize, update: NodeUpdate) -> bool {
        self.apply(&Mutation::SetNode { node: id(node), update: Box::new(update), at: time::from_micros(0).unwrap() })
    }

    fn state(&self) -> RunState {
        self.state.clone().unwrap()
    }

    fn board(&self, me: &str) -> ReadyBoard {
        self.board_of(me, Selection::default())
    }

    /// One that hands out these nodes only.
    fn board_of(&self, me: &str, nodes: Selection) -> ReadyBoard {
        ReadyBoard::new(self.state(), &Arc::new(Wish { done: DONE.to_vec(), nodes }), me)
    }
}

/// Nodes whose metadata say so.
fn in_queue(name: &str) -> Selection {
    Selection { notes: [(Box::from("queue"), RawJson::string(name))].into(), ..Selection::default() }
}

/// How many may be taken now.
fn pick_all(board: &mut ReadyBoard) -> usize {
    std::iter::from_fn(|| board.pick()).count()
}

fn queued(board: &ReadyBoard) -> BTreeSet<NodeId> {
    board.queue.iter().map(|(_, id)| id.clone()).collect()
}

/// What the queue must be, by looking at everything.
fn ready(state: &RunState, nodes: &Selection) -> BTreeSet<NodeId> {
    let done = |id: &NodeId| state.node(id.as_str()).is_some_and(|node| DONE.contains(&node.status));
    state
        .nodes()
        .filter(|(_, node)| node.status == NodeStatus::Pending && node.depends_on.iter().all(done))
        .filter(|(id, node)| nodes.takes(id, node))
        .map(|(id, _)| id.clone())
        .collect()
}

/// Whether there will be no more work of this kind, and how much of it is blocked, by looking at everything.
fn drained(state: &RunState, nodes: &Selection) -> Option<usize> {
    let of_kind =
        |status: &NodeStatus| state.nodes().filter(|(id, node)| nodes.takes(id, node) && node.status == *status).count();
    let runs = state.nodes().any(|(_, node)| node.status == NodeStatus::Running);
    let stands = !runs && ready(state, &Selection::default()).is_empty();
    let (pending, running) = (of_kind(&NodeStatus::Pending), of_kind(&NodeStatus::Running));
    (stands || pending + running == 0).then_some(pending)
}

proptest! {
    #[test]
    fn a_board_that_is_kept_up_to_date_is_one_that_is_made_anew(
        steps in prop::collection::vec((0_usize..8, 0_usize..11, prop::collection::vec(0_usize..9, 0..4)), 1..60),
        chosen in any::<bool>(),
    ) {
        let nodes = if chosen { in_queue("gpu") } else { Selection::default() };
        let mut world = World::new();
        let mut board = world.board_of("p", nodes.clone());
        for (node, what, needs) in steps {
            let update = match what {
                0 => NodeUpdate::pending(),
                1 => NodeUpdate::running(),
                2 => NodeUpdate::success(),
                3 => NodeUpdate::failed("x"),
                4 => NodeUpdate::skipped(),
                5 | 6 => NodeUpdate::new().depends_on(needs.into_iter().filter(|other| *other != node).map(id)),
                7 => NodeUpdate::new().row_count(1),
                9 => NodeUpdate::new().metadata("queue", "gpu"),
                10 => NodeUpdate::new().remove_metadata("queue"),
                _ => NodeUpdate::cached(),
            };
            if what == 7 {
                world.apply(&Mutation::DeleteNode { node: id(node) });
            } else {
                prop_assert!(world.set(node, update));
            }
            board.moved(world.state(), &[id(node)]);
            let anew = world.board_of("p", nodes.clone());
            prop_assert_eq!(queued(&board), ready(&world.state(), &nodes));
            prop_assert_eq!(queued(&anew), ready(&world.state(), &nodes));
            prop_assert_eq!((&board.tally, &board.running), (&anew.tally, &anew.running));
            prop_assert_eq!(board.drained(), drained(&world.state(), &nodes));
            prop_assert_eq!(anew.drained(), drained(&world.state(), &nodes));
        }
    }
}

#[test]
fn what_is_handed_out_is_nobody_elses_and_comes_back_when_it_changed() {
    let mut world = World::new();
    assert!(world.set(1, NodeUpdate::new()));
    let mut board = world.board("p");
    let pick = board.pick().unwrap();
    assert_eq!((pick.node.clone(), pick.taking), (id(1), Taking::Begin));
    assert!(board.pick().is_none());
    board.put_back(&pick, true);
    assert!(board.pick().is_none(), "refused without a change: somebody holds it");
    board.readmit();
    let pick = board.pick().unwrap();
    assert!(world.set(1, NodeUpdate::running()));
    assert!(world.set(1, NodeUpdate::pending()));
    board.moved(world.state(), &[id(1)]);
    assert!(board.pick().is_none(), "it is still handed out");
    board.put_back(&pick, true);
    assert_eq!(board.pick().map(|pick| pick.node), Some(id(1)), "it changed since");
    assert_eq!(board.drained(), None);
}

#[test]
fn a_claimed_node_without_a_lease_is_taken_over_and_others_are_left_alone() {
    let mut world = World::new();
    assert!(world.set(1, NodeUpdate::running().worker("w")));
    assert!(world.set(2, NodeUpdate::running()));
    assert!(world.set(3, NodeUpdate::running().worker("w")));
    let mut board = world.board("p");
    board.set_held(board.version(), |node| *node == id(3));
    let pick = board.pick().unwrap();
    assert_eq!((pick.node.clone(), pick.taking), (id(1), Taking::TakeOver));
    assert!(board.pick().is_none(), "node 2 was never claimed, the lease of node 3 is held");
    board.put_back(&pick, true);
    assert!(board.pick().is_none());
    // Written to since: whoever did it lives.
    board.set_held(board.version(), |node| *node == id(3));
    assert!(world.set(1, NodeUpdate::new().row_count(1)));
    board.moved(world.state(), &[id(1)]);
    assert!(board.pick().is_none());
    assert_eq!(board.drained(), None);
}

#[test]
fn who_was_refused_for_what_it_waits_for_is_asked_for_once_that_is_done_again() {
    let mut world = World::new();
    assert!(world.set(1, NodeUpdate::success()));
    assert!(world.set(2, NodeUpdate::new().depends_on([id(1)])));
    let mut board = world.board("p");
    let pick = board.pick().unwrap();
    board.put_back(&pick, true);
    for (update, next) in [(NodeUpdate::failed("x"), None), (NodeUpdate::success(), Some(id(2)))] {
        assert!(world.set(1, update));
        board.moved(world.state(), &[id(1)]);
        assert_eq!(board.pick().map(|pick| pick.node), next);
    }
}

#[test]
fn what_can_never_be_ready_is_told() {
    let mut world = World::new();
    assert!(world.set(1, NodeUpdate::failed("x")));
    assert!(world.set(2, NodeUpdate::new().depends_on([id(1)])));
    assert!(world.set(3, NodeUpdate::new().depends_on([id(9)])));
    assert_eq!(world.board("p").drained(), Some(2));
    assert!(world.set(1, NodeUpdate::success()));
    assert_eq!(world.board("p").drained(), None);
    let strange = Wish { done: vec![NodeStatus::Failed], nodes: Selection::default() };
    let strange = ReadyBoard::new(world.state(), &Arc::new(strange), "p");
    assert_eq!(strange.drained(), Some(2), "success was not accepted");
}

#[test]
fn a_vanished_worker_is_replaced_by_who_asks_for_its_kind_of_work() {
    let mut world = World::new();
    assert!(world.set(1, NodeUpdate::running().worker("w").metadata("queue", "gpu")));
    assert!(world.set(2, NodeUpdate::running().worker("w")));
    for (nodes, mine) in [(in_queue("gpu"), Some(id(1))), (in_queue("cpu"), None)] {
        let mut board = world.board_of("p", nodes);
        board.set_held(board.version(), |_| false);
        assert_eq!(board.pick().map(|pick| pick.node), mine);
        assert!(board.pick().is_none());
    }
}

#[test]
fn every_node_has_one_process_that_comes_first() {
    let world = World::with_ready(400);
    let names = ["a", "b", "c", "d"];
    let mut first: BTreeMap<NodeId, &str> = BTreeMap::new();
    for name in names {
        let mut board = world.board(name);
        board.set_peers(names);
        let own = board.queue.iter().filter(|((from, _), _)| from.is_zero()).count();
        assert!((50..150).contains(&own), "{own} of 400 for one of four");
        let mut orders = Vec::new();
        for _ in 0..own {
            let pick = board.pick().unwrap();
            assert!(first.insert(pick.node.clone(), name).is_none(), "two want it first");
            orders.push(pick.node);
        }
        assert!(!orders.is_sorted());
        assert!(board.pick().is_none(), "the rest is left to others first");
        assert!(board.next_at().is_some_and(|at| at <= LEAST_PATIENCE * 2));
        assert!(board.at(LEAST_PATIENCE * 2).pick().is_some(), "but not for ever");
    }
    assert_eq!(first.len(), 400);
}

#[test]
fn a_process_that_joins_is_left_the_nodes_for_which_it_comes_first() {
    let world = World::with_ready(100);
    let mut board = world.board("a");
    let joined = Duration::from_secs(10);
    board.at(joined);
    board.set_peers(["a", "b"]);
    let picked = pick_all(&mut board);
    assert!((25..75).contains(&picked), "{picked} of 100 for one of two, however long all were its own");
    // Its time has begun, once.
    board.at(joined + LEAST_PATIENCE / 2);
    board.set_peers(["a", "b", "c"]);
    board.at(joined + LEAST_PATIENCE * 2);
    assert_eq!(picked + pick_all(&mut board), 100, "but not for ever");
}

#[test]
fn processes_that_come_and_go_keep_no_node_waiting() {
    let world = World::with_ready(100);
    let mut board = world.board("a");
    let step = LEAST_PATIENCE / 4;
    for round in 0..16 {
        board.at(step * round);
        board.set_peers(if round % 2 == 0 { ["a", "b", "c"] } else { ["a", "b", "b"] });
    }
    let picked = pick_all(&mut board);
    assert_eq!(picked, 100, "all of them had their time");
}
