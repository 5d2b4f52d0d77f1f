//! Ids in their order, searched without looking at most of them: an id lies anywhere in memory, so that each one looked at is paid for.

use super::id::NodeId;

/// A sorted list of ids, no two alike.
#[derive(Debug, Clone, Default)]
pub(super) struct Ids {
    sorted: Vec<NodeId>,
    /// So many bytes all of them begin with.
    common: usize,
    /// Of each the bytes behind those, as [`key`] has them.
    keys: Vec<u64>,
}

/// Eight bytes at most, as a number that compares as they do. No id holds the byte that stands for those that are missing.
fn key(rest: &[u8]) -> u64 {
    match rest.first_chunk() {
        Some(first) => u64::from_be_bytes(*first),
        None => rest.iter().rev().fold(0, |key, byte| (key >> 8) | (u64::from(*byte) << 56)),
    }
}

fn behind(id: &str, common: usize) -> &[u8] {
    id.as_bytes().get(common..).unwrap_or_default()
}

impl Ids {
    /// Of ids that are sorted.
    pub(super) fn new(sorted: Vec<NodeId>) -> Self {
        let common = common(&sorted);
        let keys = sorted.iter().map(|id| key(behind(id.as_str(), common))).collect();
        Self { sorted, common, keys }
    }

    pub(super) fn len(&self) -> usize {
        self.sorted.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sorted.is_empty()
    }

    pub(super) fn first(&self) -> Option<&NodeId> {
        self.sorted.first()
    }

    pub(super) fn get(&self, at: usize) -> Option<&NodeId> {
        self.sorted.get(at)
    }

    /// Where an id is, or where it would be.
    pub(super) fn find(&self, id: &str) -> Result<usize, usize> {
        let known = |known: &NodeId| known.as_str().cmp(id);
        let shares = self.sorted.first().is_some_and(|first| {
            let head = id.as_bytes().get(..self.common);
            head.is_some() && head == first.as_str().as_bytes().get(..self.common)
        });
        if !shares {
            return self.sorted.binary_search_by(known);
        }
        let key = key(behind(id, self.common));
        let from = self.keys.partition_point(|known| *known < key);
        let same = self.keys.get(from..).unwrap_or_default();
        let same = if same.get(1) == Some(&key) { same.partition_point(|known| *known == key) } else { 1 };
        let same = self.sorted.get(from..from + same).unwrap_or_default();
        same.binary_search_by(known).map(|at| from + at).map_err(|at| from + at)
    }

    /// Puts in an id where it belongs.
    pub(super) fn insert(&mut self, at: usize, id: NodeId) {
        self.keys.insert(at, key(behind(id.as_str(), self.common)));
        self.sorted.insert(at, id);
        // What is common to the first and the last one is common to all.
        let common = common(&self.sorted);
        if common != self.common {
            *self = Self::new(std::mem::take(&mut self.sorted));
        }
    }

    pub(super) fn remove(&mut self, at: usize) {
        self.sorted.remove(at);
        self.keys.remove(at);
    }

    /// Leaves those before a place, and gives the others.
    pub(super) fn split_off(&mut self, at: usize) -> Vec<NodeId> {
        let rest = self.sorted.split_off(at);
        *self = Self::new(std::mem::take(&mut self.sorted));
        rest
    }
}

/// How many bytes sorted ids have in common at the beginning.
fn common(ids: &[NodeId]) -> usize {
    let (Some(first), Some(last)) = (ids.first(), ids.last()) else { return 0 };
    first.as_str().bytes().zip(last.as_str().bytes()).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(text: &str) -> NodeId {
        NodeId::new(text).unwrap()
    }

    fn name() -> impl Strategy<Value = String> {
        // Long common beginnings, ends within the eight bytes, and letters of several bytes.
        prop_oneof!["[ab]{1,3}", "node_[01]{1,12}", "node_000000000[0-9]{1,2}", "n[éèê]{1,6}[ab]{0,3}"]
    }

    proptest! {
        #[test]
        fn an_id_is_found_where_it_is_and_missed_where_it_would_be(
            names in prop::collection::vec(name(), 0..60), removed in prop::collection::vec(name(), 0..20),
        ) {
            let mut sorted: Vec<String> = Vec::new();
            let mut ids = Ids::default();
            let same = |ids: &Ids, sorted: &[String]| {
                prop_assert_eq!(ids.len(), sorted.len());
                prop_assert_eq!(ids.first().map(NodeId::as_str), sorted.first().map(String::as_str));
                for name in names.iter().chain(&removed) {
                    prop_assert_eq!(ids.find(name), sorted.binary_search(name), "{} in {:?}", name, ids);
                }
                Ok(())
            };
            for name in &names {
                if let Err(at) = ids.find(name) {
                    ids.insert(at, id(name));
                    sorted.insert(at, name.clone());
                }
                same(&ids, &sorted)?;
            }
            for name in &removed {
                if let Ok(at) = ids.find(name) {
                    ids.remove(at);
                    sorted.remove(at);
                }
                same(&ids, &sorted)?;
            }
            let mut first = ids.clone();
            let rest = Ids::new(first.split_off(sorted.len() / 2));
            same(&first, &sorted[..sorted.len() / 2])?;
            same(&rest, &sorted[sorted.len() / 2..])?;
        }
    }

    #[test]
    fn ids_that_differ_late_are_told_apart() {
        let names: Vec<String> = (0..300).map(|number| format!("a/very/long/name/{}/{number:03}", "x".repeat(200))).collect();
        let mut ids = Ids::new(names.iter().map(|name| id(name)).collect());
        // What comes before all of them has nothing in common with them.
        ids.insert(0, id("A"));
        for (at, name) in names.iter().enumerate() {
            assert_eq!(ids.find(name), Ok(at + 1));
            assert_eq!(ids.find(&format!("{name}+")), Err(at + 2));
        }
        assert_eq!(ids.find("A"), Ok(0));
        assert_eq!(ids.find(""), Err(0));
    }
}
