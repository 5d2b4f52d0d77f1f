//! Which nodes of a run can be worked on next: kept up to date by what changes, so that nobody has to look at all nodes for one of them.
//!
//! A node is ready when it is pending and all that it depends on is done; so is one that runs under a claim whose lease is gone. A board hands out those that
//! are asked for; the others are on it for what depends on them. Every process
//! takes them in an order of its own: first those for which it comes first among all processes that work on the run, so that two of them rarely
//! want the same one, then those of the others.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::id::NodeId;
use super::list::List;
use super::node::NodeState;
use super::run::{RunState, Version};
use super::select::Selection;
use super::status::NodeStatus;

/// How a node may be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taking {
    /// It is pending.
    Begin,
    /// It runs, its worker is gone.
    TakeOver,
}

/// Which nodes are asked for, and when they are ready.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Wish {
    /// The statuses that count as done.
    pub(crate) done: Vec<NodeStatus>,
    pub(crate) nodes: Selection,
}

/// A node to be taken, as it was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pick {
    pub(crate) node: NodeId,
    pub(crate) seen: Arc<NodeState>,
    pub(crate) taking: Taking,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Pending,
    Running,
    Done,
    Other,
}

/// How long a ready node is left to the process that comes before this one for it, in the time that a claim takes now: who comes first may be busy,
/// or gone, but it is also just claiming it, or has, and this process has not heard of it yet.
const PATIENCE: u32 = 4;
const LEAST_PATIENCE: Duration = Duration::from_millis(10);
const MOST_PATIENCE: Duration = Duration::from_millis(500);

/// From when on a node may be taken, and where it stands then in the order of this process.
type Place = (Duration, u64);

#[derive(Debug)]
struct Card {
    kind: Kind,
    /// Whether it is asked for; those that are not are there for those that depend on them.
    wanted: bool,
    /// How many of the nodes that it depends on are not done.
    missing: usize,
    needs: List<NodeId>,
    place: Option<Place>,
    /// Since when it has one.
    since: Duration,
}

impl Card {
    fn is_ready(&self) -> bool {
        self.kind == Kind::Pending && self.missing == 0
    }
}

/// How many nodes there are of a kind.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    /// Ready ones, wanted or not.
    ready: usize,
    /// Pending ones that are wanted.
    pending: usize,
    /// Wanted ones that are pending or run.
    open: usize,
}

impl Tally {
    fn add(&mut self, card: &Card) {
        self.ready += usize::from(card.is_ready());
        self.pending += usize::from(card.wanted && card.kind == Kind::Pending);
        self.open += usize::from(card.wanted && matches!(card.kind, Kind::Pending | Kind::Running));
    }

    fn take(&mut self, card: &Card) {
        self.ready -= usize::from(card.is_ready());
        self.pending -= usize::from(card.wanted && card.kind == Kind::Pending);
        self.open -= usize::from(card.wanted && matches!(card.kind, Kind::Pending | Kind::Running));
    }
}

/// The ready nodes of one run, as one process sees them.
#[derive(Debug)]
pub(crate) struct ReadyBoard {
    wish: Arc<Wish>,
    state: RunState,
    cards: HashMap<NodeId, Card>,
    dependents: HashMap<NodeId, Vec<NodeId>>,
    queue: BTreeSet<(Place, NodeId)>,
    /// The time of the caller, as it was told last.
    now: Duration,
    /// How long a claim takes lately.
    claiming: Duration,
    /// Handed out and not told of yet.
    taken: HashSet<NodeId>,
    /// Those of them whose place became free meanwhile: that they were refused means nothing any more.
    vacated: HashSet<NodeId>,
    running: HashSet<NodeId>,
    /// Refused to us without a visible reason: not asked for again before [`readmit`](Self::readmit).
    left_out: HashSet<NodeId>,
    /// Claimed nodes whose lease was gone, as they were then.
    dead: HashMap<NodeId, Version>,
    tally: Tally,
    me: u64,
    /// All processes that work on the run, this one included, sorted.
    peers: Vec<u64>,
}

impl ReadyBoard {
    /// The board of a run for the process of this name.
    pub(crate) fn new(state: RunState, wish: &Arc<Wish>, me: &str) -> Self {
        let me = hash(me);
        let mut board = Self {
            wish: Arc::clone(wish),
            state,
            cards: HashMap::new(),
            dependents: HashMap::new(),
            queue: BTreeSet::new(),
            now: Duration::ZERO,
            claiming: Duration::ZERO,
            taken: HashSet::new(),
            vacated: HashSet::new(),
            running: HashSet::new(),
            left_out: HashSet::new(),
            dead: HashMap::new(),
            tally: Tally::default(),
            me,
            peers: vec![me],
        };
        board.rebuild();
        board
    }

    pub(crate) fn version(&self) -> Version {
        self.state.version()
    }

    pub(crate) fn state(&self) -> &RunState {
        &self.state
    }

    pub(crate) fn is_for(&self, wish: &Arc<Wish>) -> bool {
        Arc::ptr_eq(&self.wish, wish) || self.wish == *wish
    }

    /// Takes in a state in which only these nodes differ from the last one.
    pub(crate) fn moved(&mut self, state: RunState, changed: &[NodeId]) {
        self.state = state;
        for node in changed {
            self.refresh(node);
        }
    }

    /// Takes in a state of which nothing is known.
    pub(crate) fn replaced(&mut self, state: RunState) {
        self.state = state;
        self.rebuild();
    }

    /// Asks again for what was refused without a visible reason.
    pub(crate) fn readmit(&mut self) {
        for id in std::mem::take(&mut self.left_out) {
            self.place(&id);
        }
    }

    /// Somebody of this process held a node, and does not any more: it is asked for again if that is why it was refused. Says whether it can be had now.
    pub(crate) fn vacated(&mut self, id: &NodeId) -> bool {
        if self.taken.contains(id) {
            self.vacated.insert(id.clone());
            return false;
        }
        let refused = self.left_out.remove(id);
        if refused {
            self.place(id);
        }
        refused
    }

    /// Puts everything in its place anew.
    fn rebuild(&mut self) {
        self.cards.clear();
        self.dependents.clear();
        self.queue.clear();
        self.running.clear();
        self.left_out.clear();
        self.tally = Tally::default();
        let state = self.state.clone();
        for (id, node) in state.nodes() {
            self.cards.insert(id.clone(), self.card(id, node));
            for needed in &node.depends_on {
                self.dependents.entry(needed.clone()).or_default().push(id.clone());
            }
        }
        for (id, node) in state.nodes() {
            let missing = self.missing(&node.depends_on);
            if let Some(card) = self.cards.get_mut(id) {
                card.missing = missing;
                self.tally.add(card);
                if card.kind == Kind::Running {
                    self.running.insert(id.clone());
                }
            }
            self.place(id);
        }
        let Self { dead, running, .. } = self;
        dead.retain(|id, _| running.contains(id));
    }

    /// The card of a node of whose dependencies nothing is known.
    fn card(&self, id: &NodeId, node: &NodeState) -> Card {
        let kind = self.kind(node);
        // What has ended is handed out to nobody, and need not be looked at.
        let wanted = matches!(kind, Kind::Pending | Kind::Running) && self.wish.nodes.takes(id, node);
        Card { kind, wanted, missing: 0, needs: node.depends_on.clone(), place: None, since: Duration::ZERO }
    }

    fn kind(&self, node: &NodeState) -> Kind {
        match &node.status {
            NodeStatus::Pending => Kind::Pending,
            NodeStatus::Running => Kind::Running,
            status if self.wish.done.contains(status) => Kind::Done,
            _ => Kind::Other,
        }
    }

    fn missing(&self, needs: &[NodeId]) -> usize {
        needs.iter().filter(|needed| self.cards.get(*needed).is_none_or(|card| card.kind != Kind::Done)).count()
    }

    /// Looks at one node again.
    fn refresh(&mut self, id: &NodeId) {
        if !self.left_out.is_empty() {
            self.left_out.remove(id);
        }
        let node = self.state.node_shared(id.as_str());
        let new = node.as_ref().map(|node| self.card(id, node));
        let kind = new.as_ref().map(|card| card.kind);
        let was = match (self.cards.get_mut(id), new) {
            // What it waits for seldom changes.
            (Some(card), Some(new)) if card.needs == new.needs => {
                self.tally.take(card);
                card.wanted = new.wanted;
                let was = std::mem::replace(&mut card.kind, new.kind);
                self.tally.add(card);
                Some(was)
            }
            (_, new) => self.exchange(id, new),
        };
        match (was == Some(Kind::Running), kind == Some(Kind::Running)) {
            (true, false) => drop(self.running.remove(id)),
            (false, true) => drop(self.running.insert(id.clone())),
            _ => {}
        }
        self.place(id);
        let (was_done, is_done) = (was == Some(Kind::Done), kind == Some(Kind::Done));
        if was_done != is_done {
            self.tell_dependents(id, is_done);
        }
    }

    /// Puts a card in the place of another one, or takes it away; of what kind the other one was.
    fn exchange(&mut self, id: &NodeId, new: Option<Card>) -> Option<Kind> {
        let old = self.cards.remove(id);
        if let Some(card) = &old {
            self.tally.take(card);
            if let Some(place) = card.place {
                self.queue.remove(&(place, id.clone()));
            }
            for needed in &card.needs {
                if let Some(dependents) = self.dependents.get_mut(needed) {
                    dependents.retain(|dependent| dependent != id);
                }
            }
        }
        match new {
            Some(mut card) => {
                for needed in &card.needs {
                    self.dependents.entry(needed.clone()).or_default().push(id.clone());
                }
                card.missing = self.missing(&card.needs);
                self.tally.add(&card);
                self.cards.insert(id.clone(), card);
            }
            None => {
                self.dead.remove(id);
            }
        }
        old.map(|card| card.kind)
    }

    /// A node is done, or not any more: for those that wait for it.
    fn tell_dependents(&mut self, id: &NodeId, is_done: bool) {
        let Some(dependents) = self.dependents.get_mut(id).map(std::mem::take) else { return };
        for dependent in &dependents {
            let Some(card) = self.cards.get_mut(dependent) else { continue };
            self.tally.take(card);
            card.missing = if is_done { card.missing.saturating_sub(1) } else { card.missing + 1 };
            self.tally.add(card);
            // It may have been refused because of this: now the state tells.
            self.left_out.remove(dependent);
            self.place(dependent);
        }
        if let Some(place) = self.dependents.get_mut(id) {
            *place = dependents;
        }
    }

    fn is_dead(&self, id: &NodeId) -> bool {
        let seen = self.dead.get(id);
        seen.is_some() && self.state.node(id.as_str()).map(|node| node.version).as_ref() == seen
    }

    /// Queues a node if it may be taken, else takes it out of the queue.
    fn place(&mut self, id: &NodeId) {
        self.place_since(id, self.now);
    }

    /// As [`place`](Self::place), as from then on.
    fn place_since(&mut self, id: &NodeId, since: Duration) {
        let Some(card) = self.cards.get(id) else { return };
        let free = card.wanted
            && (card.is_ready() || (card.kind == Kind::Running && self.is_dead(id)))
            && !self.taken.contains(id)
            && !self.left_out.contains(id);
        let old = card.place;
        if old.is_some() == free {
            return;
        }
        let new = free.then(|| self.order(id, since));
        if let Some(old) = old {
            self.queue.remove(&(old, id.clone()));
        }
        if let Some(new) = new {
            self.queue.insert((new, id.clone()));
        }
        if let Some(card) = self.cards.get_mut(id) {
            card.place = new;
            card.since = since;
        }
    }

    /// At once where this process comes first for a node, else when those before it had their time; and then in an order that differs between
    /// processes.
    fn order(&self, id: &NodeId, since: Duration) -> Place {
        let name = hash(id.as_str());
        let mine = mix(name ^ self.me);
        let before = self.peers.iter().filter(|peer| mix(name ^ **peer) > mine).count();
        let patience = (self.claiming * PATIENCE).clamp(LEAST_PATIENCE, MOST_PATIENCE);
        // Who comes first has the most reason to be let go first; all others follow one another.
        let patience = patience + patience.saturating_mul(u32::try_from(before.saturating_sub(1)).unwrap_or(u32::MAX).min(8)) / 4;
        let from = if before == 0 { Duration::ZERO } else { since.saturating_add(patience) };
        (from, mine)
    }

    /// Says which processes work on the run.
    pub(crate) fn set_peers<'p>(&mut self, peers: impl IntoIterator<Item = &'p str>) {
        let mut peers: Vec<u64> = peers.into_iter().map(hash).chain([self.me]).collect();
        peers.sort_unstable();
        peers.dedup();
        if peers != self.peers {
            self.peers = peers;
            for ((from, _), id) in std::mem::take(&mut self.queue) {
                let Some(card) = self.cards.get_mut(&id) else { continue };
                card.place = None;
                // The time for which it was left to others counts: where processes come and go it would never be over. One that was this process's own
                // was left to nobody yet.
                let since = if from.is_zero() { self.now } else { card.since };
                self.place_since(&id, since);
            }
        }
    }

    /// Says for which claimed nodes a lease is held, of those that ran at the version of this state or before.
    pub(crate) fn set_held(&mut self, version: Version, held: impl Fn(&NodeId) -> bool) {
        let dead: HashMap<NodeId, Version> = self
            .running
            .iter()
            .filter_map(|id| Some((id, self.state.node(id.as_str())?)))
            .filter(|(id, node)| node.worker.is_some() && node.version <= version && !held(id))
            .map(|(id, node)| (id.clone(), node.version))
            .collect();
        let before = std::mem::replace(&mut self.dead, dead);
        let touched: Vec<NodeId> = before.into_keys().chain(self.dead.keys().cloned()).collect();
        for id in touched {
            self.place(&id);
        }
    }

    /// Tells the time: any clock that never goes back.
    pub(crate) fn at(&mut self, now: Duration) -> &mut Self {
        self.now = self.now.max(now);
        self
    }

    /// Tells how long a claim took.
    pub(crate) fn claim_took(&mut self, time: Duration) {
        self.claiming = (self.claiming * 7 + time.min(MOST_PATIENCE)) / 8;
    }

    /// Hands out the next node; it is nobody else's until it is [`put_back`](Self::put_back).
    pub(crate) fn pick(&mut self) -> Option<Pick> {
        while self.has_next() {
            let (_, node) = self.queue.pop_first()?;
            let Some(card) = self.cards.get_mut(&node) else { continue };
            card.place = None;
            let taking = if card.kind == Kind::Running { Taking::TakeOver } else { Taking::Begin };
            let Some(seen) = self.state.node_shared(node.as_str()) else { continue };
            self.taken.insert(node.clone());
            return Some(Pick { node, seen, taking });
        }
        None
    }

    /// What was handed out is settled: the state says what became of it. A node that was refused to us without having changed is left out until
    /// [`readmit`](Self::readmit): somebody holds it in a way that the state does not tell.
    pub(crate) fn put_back(&mut self, pick: &Pick, refused: bool) {
        self.taken.remove(&pick.node);
        let refused = !self.vacated.remove(&pick.node) && refused;
        let same = self.state.node(pick.node.as_str()).is_some_and(|node| node.version == pick.seen.version);
        if refused && same {
            self.left_out.insert(pick.node.clone());
            if pick.taking == Taking::TakeOver {
                self.dead.remove(&pick.node);
            }
        } else {
            self.place(&pick.node);
        }
    }

    /// Whether a node waits to be taken now.
    pub(crate) fn has_next(&self) -> bool {
        self.next_at().is_some_and(|at| at <= self.now)
    }

    /// From when on the next node may be taken.
    pub(crate) fn next_at(&self) -> Option<Duration> {
        self.queue.first().map(|((from, _), _)| *from)
    }

    /// How many of the nodes that are asked for are pending.
    pub(crate) fn pending(&self) -> usize {
        self.tally.pending
    }

    /// How many of the nodes that are asked for are pending and wait for others that nobody works on; `None` while any of them may still become ready.
    pub(crate) fn drained(&self) -> Option<usize> {
        let stands = self.tally.ready == 0 && self.running.is_empty();
        (stands || self.tally.open == 0).then_some(self.tally.pending)
    }
}

/// FNV-1a: the same in every process, and no secret.
fn hash(text: &str) -> u64 {
    mix(text.bytes().fold(0xCBF2_9CE4_8422_2325, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)))
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
#[path = "ready_tests.rs"]
mod tests;
