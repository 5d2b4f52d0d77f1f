//! Which pending nodes nothing will make ready, against an oracle that tries whatever may happen.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use seeknal_state::{BlockedReason, List, NodeId, NodeState, NodeStatus, RunHeader, RunId, RunState, RunStatus, Version};

type Plan = BTreeMap<u8, (NodeStatus, Vec<u8>)>;

fn id(number: u8) -> NodeId {
    NodeId::new(format!("n{number:02}")).unwrap()
}

fn run(plan: &Plan) -> RunState {
    let at = seeknal_state::model::time::parse("2024-01-10T12:00:00Z").unwrap();
    let nodes = plan.iter().map(|(number, (status, needs))| {
        let mut node = NodeState::new(status.clone());
        node.depends_on = needs.iter().copied().map(id).collect::<List<_>>();
        (id(*number), node)
    });
    let header = RunHeader::new(RunStatus::Running, at);
    RunState::from_parts(RunId::new("r").unwrap(), header, Version(1), Version(1), nodes.collect::<Vec<_>>())
}

/// The nodes that may be done one day: found by looking at all of them until nothing changes.
fn may_be_done(plan: &Plan) -> BTreeSet<u8> {
    let is_good = |status: &NodeStatus| {
        matches!(status, NodeStatus::Success | NodeStatus::Cached | NodeStatus::Skipped | NodeStatus::Running)
    };
    let mut may: BTreeSet<u8> = plan.iter().filter(|(_, (status, _))| is_good(status)).map(|(number, _)| *number).collect();
    loop {
        let before = may.len();
        for (number, (status, needs)) in plan {
            if *status == NodeStatus::Pending && needs.iter().all(|needed| may.contains(needed)) {
                may.insert(*number);
            }
        }
        if may.len() == before {
            return may;
        }
    }
}

/// Everything that a node depends on, itself or through pending ones.
fn reached(plan: &Plan, from: u8) -> BTreeSet<u8> {
    let (mut seen, mut next) = (BTreeSet::new(), vec![from]);
    while let Some(at) = next.pop() {
        if let Some((NodeStatus::Pending, needs)) = plan.get(&at) {
            next.extend(needs.iter().copied().filter(|needed| seen.insert(*needed)));
        }
    }
    seen
}

fn plans() -> impl Strategy<Value = Plan> {
    let status = prop_oneof![
        6 => Just(NodeStatus::Pending),
        1 => Just(NodeStatus::Running),
        2 => Just(NodeStatus::Success),
        1 => Just(NodeStatus::Skipped),
        1 => Just(NodeStatus::Failed),
        1 => Just(NodeStatus::parse("cancelled")),
    ];
    // Of sixteen names some are no node.
    proptest::collection::btree_map(0..16_u8, (status, proptest::collection::vec(0..16_u8, 0..4)), 0..16)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn what_will_not_become_ready_is_told_with_what_keeps_it(plan in plans()) {
        let may = may_be_done(&plan);
        let told = run(&plan).blocked();
        let expected: Vec<NodeId> =
            plan.iter().filter(|(number, (status, _))| *status == NodeStatus::Pending && !may.contains(number)).map(|(number, _)| id(*number)).collect();
        prop_assert_eq!(told.iter().map(|blocked| blocked.node.clone()).collect::<Vec<_>>(), expected);
        for blocked in &told {
            let number = |id: &NodeId| id.as_str()[1..].parse::<u8>().unwrap();
            let (node, by) = (number(&blocked.node), number(&blocked.by));
            let reached = reached(&plan, node);
            prop_assert!(reached.contains(&by), "{:?}", blocked);
            let is_lost = |at: &u8| plan.get(at).is_none_or(|(status, _)| *status != NodeStatus::Pending && !may.contains(at));
            match &blocked.reason {
                BlockedReason::Missing => prop_assert!(!plan.contains_key(&by), "{:?}", blocked),
                BlockedReason::Ended(status) => prop_assert!(plan[&by].0 == *status && is_lost(&by), "{:?}", blocked),
                // Only where nothing else is to be told.
                BlockedReason::Circle => {
                    prop_assert!(!reached.iter().any(is_lost), "{:?}", blocked);
                    prop_assert!(plan[&node].1.contains(&by) && !may.contains(&by), "{:?}", blocked);
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }
}

#[test]
fn other_statuses_may_count_as_done() {
    let plan =
        Plan::from([(1, (NodeStatus::Failed, vec![])), (2, (NodeStatus::Pending, vec![1])), (3, (NodeStatus::Skipped, vec![]))]);
    let run = run(&plan);
    assert_eq!(run.blocked().len(), 1);
    assert!(run.blocked_unless(&[NodeStatus::Failed]).is_empty());
}

/// As deep as a run may be: nothing here goes down by calling itself.
#[test]
fn a_chain_of_a_hundred_thousand_is_told_in_one_go() {
    let at = seeknal_state::model::time::parse("2024-01-10T12:00:00Z").unwrap();
    let name = |number: usize| NodeId::new(format!("n{number:06}")).unwrap();
    let nodes = (0..100_000).map(|number: usize| {
        let mut node = NodeState::new(NodeStatus::Pending);
        node.depends_on = [name(number + 1)].into_iter().collect::<List<_>>();
        (name(number), node)
    });
    let header = RunHeader::new(RunStatus::Running, at);
    let run = RunState::from_parts(RunId::new("r").unwrap(), header, Version(1), Version(1), nodes.collect::<Vec<_>>());
    let told = run.blocked();
    assert_eq!(told.len(), 100_000);
    assert!(told.iter().all(|blocked| blocked.by == name(100_000) && blocked.reason == BlockedReason::Missing));
}
