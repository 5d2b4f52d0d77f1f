//! The nodes of a run: a map in the order of their ids of which every version is kept as long as somebody reads it.
//!
//! ```text
//! chunks ─► firsts, [ chunk, … ]     copied by every change: one pointer a chunk; a small map is one chunk
//! chunk  ─► ids, states              copied once in RECENT changes
//!           recent ─► r ─► r ─► …    what was put since, newest first: a change is one link more
//! ```
//! A change touches little memory that another thread has: the versions of a run are made by one thread, written by a second and dropped by a third,
//! so that each touched line of memory costs more than the work on it. (Measured against the red-black tree of `rpds`, whose path is copied: the
//! benchmark's runs of 100 nodes gain most.)

use std::sync::Arc;

use super::id::NodeId;
use super::ids::Ids;
use super::node::NodeState;

/// Changes of a chunk that are kept beside it, at most.
const RECENT: u32 = 16;

/// Nodes of a chunk at most; the second number for maps that would have many of them.
const SMALL: usize = 128;
const LARGE: usize = 512;
const MANY: usize = 64 * SMALL;

/// The map. A clone shares everything.
#[derive(Clone)]
pub(super) struct NodeMap {
    chunks: Chunks,
    len: usize,
}

#[derive(Clone)]
enum Chunks {
    /// Most runs are small.
    One(Chunk),
    /// In order; none is empty. Of an id that comes before all firsts the chunk is the first one.
    Many { firsts: Arc<Ids>, chunks: Arc<[Arc<Chunk>]> },
}

#[derive(Clone)]
struct Chunk {
    ids: Arc<Ids>,
    /// Of each id; what is recent is newer.
    states: Arc<Vec<Arc<NodeState>>>,
    recent: Option<Arc<Recent>>,
}

/// A state that was put.
struct Recent {
    /// Which of the chunk's ids it is of.
    at: usize,
    state: Arc<NodeState>,
    /// How many there are, with this one.
    count: u32,
    older: Option<Arc<Recent>>,
}

impl Chunk {
    fn of(nodes: &[(NodeId, Arc<NodeState>)]) -> Self {
        let (ids, states): (Vec<NodeId>, _) = nodes.iter().cloned().unzip();
        Self { ids: Arc::new(Ids::new(ids)), states: Arc::new(states), recent: None }
    }

    fn recent(&self) -> impl Iterator<Item = &Recent> {
        std::iter::successors(self.recent.as_deref(), |recent| recent.older.as_deref())
    }

    fn state(&self, at: usize) -> Option<&Arc<NodeState>> {
        self.recent().find(|recent| recent.at == at).map(|recent| &recent.state).or_else(|| self.states.get(at))
    }

    fn put(&mut self, at: usize, state: Arc<NodeState>) {
        let count = self.recent.as_ref().map_or(1, |recent| recent.count + 1);
        // Nobody else reads it: then it need not be kept.
        let alone = self.recent.is_none() && Arc::get_mut(&mut self.states).is_some();
        if !alone && count <= RECENT {
            self.recent = Some(Arc::new(Recent { at, state, count, older: self.recent.take() }));
            return;
        }
        if let Some(place) = self.settle().get_mut(at) {
            *place = state;
        }
    }

    /// The states with all that is recent.
    fn settle(&mut self) -> &mut Vec<Arc<NodeState>> {
        let recent = self.recent.take();
        let states = Arc::make_mut(&mut self.states);
        let newest_first: Vec<&Recent> = std::iter::successors(recent.as_deref(), |recent| recent.older.as_deref()).collect();
        for recent in newest_first.into_iter().rev() {
            if let Some(place) = states.get_mut(recent.at) {
                *place = Arc::clone(&recent.state);
            }
        }
        states
    }

    fn insert(&mut self, at: usize, id: NodeId, state: Arc<NodeState>) {
        self.settle().insert(at, state);
        Arc::make_mut(&mut self.ids).insert(at, id);
    }

    fn remove(&mut self, at: usize) {
        self.settle().remove(at);
        Arc::make_mut(&mut self.ids).remove(at);
    }

    /// Leaves the first half, and gives the other one.
    fn split(&mut self) -> Self {
        let half = self.ids.len() / 2;
        let states = self.settle().split_off(half);
        let ids = Arc::make_mut(&mut self.ids).split_off(half);
        Self { ids: Arc::new(Ids::new(ids)), states: Arc::new(states), recent: None }
    }
}

impl Chunks {
    /// In which chunk an id is, or would be.
    fn place(&self, id: &str) -> usize {
        match self {
            Self::One(_) => 0,
            Self::Many { firsts, .. } => firsts.find(id).unwrap_or_else(|at| at.saturating_sub(1)),
        }
    }

    fn get(&self, place: usize) -> Option<&Chunk> {
        match self {
            Self::One(chunk) => (place == 0).then_some(chunk),
            Self::Many { chunks, .. } => chunks.get(place).map(|chunk| &**chunk),
        }
    }

    fn get_mut(&mut self, place: usize) -> Option<&mut Chunk> {
        match self {
            Self::One(chunk) => (place == 0).then_some(chunk),
            Self::Many { chunks, .. } => Arc::make_mut(chunks).get_mut(place).map(Arc::make_mut),
        }
    }

    /// Puts a chunk behind another one.
    fn add(&mut self, place: usize, second: Chunk) {
        let second = Arc::new(second);
        *self = match self {
            Self::One(first) => Self::many(vec![Arc::new(first.clone()), second]),
            Self::Many { chunks, .. } => {
                let (before, after) = chunks.split_at_checked(place + 1).unwrap_or((chunks, &[]));
                Self::many(before.iter().cloned().chain(std::iter::once(second)).chain(after.iter().cloned()).collect())
            }
        };
    }

    fn many(chunks: Vec<Arc<Chunk>>) -> Self {
        if let [only] = &*chunks {
            return Self::One(Chunk::clone(only));
        }
        let firsts = chunks.iter().filter_map(|chunk| chunk.ids.first().cloned()).collect();
        Self::Many { firsts: Arc::new(Ids::new(firsts)), chunks: chunks.into() }
    }
}

impl NodeMap {
    pub(super) fn new() -> Self {
        Self { chunks: Chunks::One(Chunk::of(&[])), len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn get(&self, id: &str) -> Option<&Arc<NodeState>> {
        let chunk = self.chunks.get(self.chunks.place(id))?;
        chunk.state(chunk.ids.find(id).ok()?)
    }

    pub(super) fn insert(&mut self, id: &NodeId, state: Arc<NodeState>) {
        self.change(id, |_| state);
    }

    /// Puts in what is made of the state that is there; answers with it.
    pub(super) fn change(
        &mut self,
        id: &NodeId,
        change: impl FnOnce(Option<&Arc<NodeState>>) -> Arc<NodeState>,
    ) -> Option<Arc<NodeState>> {
        let place = self.chunks.place(id.as_str());
        let most = if self.len < MANY { SMALL } else { LARGE };
        let chunk = self.chunks.get_mut(place)?;
        let found = chunk.ids.find(id.as_str());
        let state = change(found.ok().and_then(|at| chunk.state(at)));
        let kept = Arc::clone(&state);
        match found {
            Ok(at) => chunk.put(at, state),
            Err(at) => {
                chunk.insert(at, id.clone(), state);
                self.len += 1;
                if chunk.ids.len() > most {
                    let second = chunk.split();
                    self.chunks.add(place, second);
                }
            }
        }
        Some(kept)
    }

    /// Whether it was there.
    pub(super) fn remove(&mut self, id: &str) -> bool {
        let place = self.chunks.place(id);
        let Some(at) = self.chunks.get(place).and_then(|chunk| chunk.ids.find(id).ok()) else { return false };
        let Some(chunk) = self.chunks.get_mut(place) else { return false };
        chunk.remove(at);
        self.len -= 1;
        if chunk.ids.is_empty()
            && let Chunks::Many { chunks, .. } = &self.chunks
        {
            self.chunks = Chunks::many(chunks.iter().filter(|chunk| !chunk.ids.is_empty()).cloned().collect());
        }
        true
    }

    pub(super) fn iter(&self) -> Iter<'_> {
        let (first, more) = match &self.chunks {
            Chunks::One(chunk) => (Some(chunk), [].iter()),
            Chunks::Many { chunks, .. } => (None, chunks.iter()),
        };
        Iter { chunks: more, chunk: first, at: 0, left: self.len }
    }
}

/// The nodes in the order of their ids.
pub(super) struct Iter<'m> {
    chunks: std::slice::Iter<'m, Arc<Chunk>>,
    chunk: Option<&'m Chunk>,
    at: usize,
    left: usize,
}

impl<'m> Iterator for Iter<'m> {
    type Item = (&'m NodeId, &'m Arc<NodeState>);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(chunk) = self.chunk
                && let (Some(id), Some(state)) = (chunk.ids.get(self.at), chunk.state(self.at))
            {
                self.at += 1;
                self.left = self.left.saturating_sub(1);
                return Some((id, state));
            }
            self.chunk = Some(self.chunks.next()?);
            self.at = 0;
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Iter<'_> {}

/// Of nodes with the same id the last one stays.
impl FromIterator<(NodeId, Arc<NodeState>)> for NodeMap {
    fn from_iter<I: IntoIterator<Item = (NodeId, Arc<NodeState>)>>(nodes: I) -> Self {
        let mut nodes: Vec<_> = nodes.into_iter().collect();
        nodes.sort_by(|(a, _), (b, _)| a.cmp(b));
        nodes.dedup_by(|later, earlier| {
            let same = later.0 == earlier.0;
            if same {
                std::mem::swap(later, earlier);
            }
            same
        });
        let most = if nodes.len() < MANY { SMALL } else { LARGE };
        // As even as can be, and with room for more.
        let parts = nodes.len().div_ceil(most * 3 / 4).max(1);
        let chunks = match parts {
            1 => Chunks::One(Chunk::of(&nodes)),
            _ => Chunks::many(nodes.chunks(nodes.len().div_ceil(parts)).map(|part| Arc::new(Chunk::of(part))).collect()),
        };
        Self { chunks, len: nodes.len() }
    }
}

impl PartialEq for NodeMap {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.iter().eq(other.iter())
    }
}

impl Eq for NodeMap {}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::model::NodeStatus;

    #[derive(Debug, Clone)]
    enum Step {
        Put(u16),
        Remove(u16),
        /// Looks at the version of now again at the end.
        Keep,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (0..400_u16).prop_map(Step::Put),
            4 => (0..8_u16).prop_map(Step::Put),
            3 => (0..400_u16).prop_map(Step::Remove),
            2 => Just(Step::Keep),
        ]
    }

    fn id(number: u16) -> NodeId {
        NodeId::new(format!("node {number:05}")).unwrap()
    }

    fn state(attempt: usize) -> Arc<NodeState> {
        let mut state = NodeState::new(NodeStatus::Pending);
        state.attempt = u32::try_from(attempt).unwrap();
        Arc::new(state)
    }

    fn same(map: &NodeMap, oracle: &BTreeMap<NodeId, Arc<NodeState>>) {
        assert_eq!(map.len(), oracle.len());
        assert_eq!(map.iter().len(), oracle.len());
        assert!(map.iter().eq(oracle.iter()));
        for (id, state) in oracle {
            assert_eq!(map.get(id.as_str()), Some(state));
        }
        for absent in ["", "node", "node 00200x", "nodf"] {
            assert_eq!(map.get(absent), None);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn it_is_a_map_and_what_was_kept_stays(first in 0..400_u16, steps in prop::collection::vec(step(), 0..800)) {
            let mut oracle: BTreeMap<NodeId, Arc<NodeState>> = (0..first).map(|number| (id(number), state(0))).collect();
            let mut map: NodeMap = oracle.clone().into_iter().collect();
            let mut kept = vec![(map.clone(), oracle.clone())];
            for (index, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Put(number) => {
                        map.insert(&id(number), state(index));
                        oracle.insert(id(number), state(index));
                    }
                    Step::Remove(number) => {
                        prop_assert_eq!(map.remove(id(number).as_str()), oracle.remove(&id(number)).is_some());
                    }
                    Step::Keep => kept.push((map.clone(), oracle.clone())),
                }
            }
            kept.push((map, oracle));
            for (map, oracle) in &kept {
                same(map, oracle);
                prop_assert!(*map == oracle.clone().into_iter().collect());
            }
            for ((a, of_a), (b, of_b)) in kept.iter().zip(kept.iter().skip(1)) {
                prop_assert_eq!(a == b, of_a == of_b);
            }
        }
    }

    #[test]
    fn of_two_with_one_name_the_last_stays() {
        let map: NodeMap = [(id(2), state(1)), (id(1), state(2)), (id(2), state(3))].into_iter().collect();
        same(&map, &BTreeMap::from([(id(1), state(2)), (id(2), state(3))]));
    }

    #[test]
    fn a_large_map_is_one_too() {
        let mut oracle: BTreeMap<NodeId, Arc<NodeState>> = BTreeMap::new();
        let mut map = NodeMap::new();
        for number in 0..20_000_u16 {
            // Not in their order, every one once.
            let number = u16::try_from(u32::from(number) * 7_919 % 20_000).unwrap();
            map.insert(&id(number), state(1));
            oracle.insert(id(number), state(1));
        }
        same(&map, &oracle);
        let before = map.clone();
        for number in (0..20_000).step_by(3) {
            map.insert(&id(number), state(2));
        }
        same(&before, &oracle);
        for number in (0..20_000).step_by(3) {
            oracle.insert(id(number), state(2));
        }
        same(&map, &oracle);
        for number in (0..20_000).step_by(2) {
            assert!(map.remove(id(number).as_str()));
            oracle.remove(&id(number));
        }
        same(&map, &oracle);
        assert!(!map.remove("node 00000"));
    }
}
