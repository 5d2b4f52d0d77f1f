//! Which nodes of a run somebody asks for.

use std::collections::{BTreeMap, BTreeSet};

use super::id::NodeId;
use super::json::RawJson;
use super::node::NodeState;

/// Nodes by their names, by how their names begin, by what their metadata says; what is not said restricts nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Selection {
    /// One of these names.
    pub(crate) ids: Option<BTreeSet<Box<str>>>,
    /// One of these beginnings.
    pub(crate) prefixes: BTreeSet<Box<str>>,
    /// All of these notes.
    pub(crate) notes: BTreeMap<Box<str>, RawJson>,
}

impl Selection {
    /// Whether a node is among them.
    pub(crate) fn takes(&self, id: &NodeId, node: &NodeState) -> bool {
        let id = id.as_str();
        self.ids.as_ref().is_none_or(|ids| ids.contains(id))
            && (self.prefixes.is_empty() || self.prefixes.iter().any(|prefix| id.starts_with(&**prefix)))
            && self.notes.iter().all(|(key, asked)| node.metadata.get(key).is_some_and(|told| is_same(told, asked)))
    }
}

/// Whether two texts are one value: whoever wrote them may have set blanks and the order of members otherwise. Both are read alike, as floats must be.
fn is_same(told: &RawJson, asked: &RawJson) -> bool {
    told == asked || told.to_value().is_ok_and(|told| asked.to_value().is_ok_and(|asked| told == asked))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    use crate::model::{Mutation, NewRun, NodeUpdate, RunId, Version, apply, time};

    fn node(update: NodeUpdate) -> NodeState {
        let (run, at) = (RunId::new("r").unwrap(), time::from_micros(0).unwrap());
        let mut state = None;
        apply(&mut state, &run, &Mutation::Create { run: NewRun::running(), at }, Version(1)).unwrap();
        let set = Mutation::SetNode { node: NodeId::new("n").unwrap(), update: Box::new(update), at };
        apply(&mut state, &run, &set, Version(2)).unwrap();
        state.unwrap().node("n").unwrap().clone()
    }

    fn names<const N: usize>(names: [&str; N]) -> BTreeSet<Box<str>> {
        names.into_iter().map(Box::from).collect()
    }

    #[test]
    fn all_that_is_said_must_hold_and_what_is_not_said_restricts_nothing() {
        let plain = node(NodeUpdate::pending());
        let gpu = node(NodeUpdate::pending().metadata("queue", "gpu").metadata("size", 3));
        let takes = |selection: &Selection, name: &str, node: &NodeState| selection.takes(&NodeId::new(name).unwrap(), node);
        let all = Selection::default();
        assert!(takes(&all, "a", &plain) && takes(&all, "b", &gpu));
        let named = Selection { ids: Some(names(["a", "b"])), ..Selection::default() };
        assert!(takes(&named, "a", &plain) && takes(&named, "b", &plain) && !takes(&named, "ab", &plain));
        let none = Selection { ids: Some(BTreeSet::new()), ..Selection::default() };
        assert!(!takes(&none, "a", &plain), "no name is not every name");
        let begins = Selection { prefixes: names(["load.", "äh"]), ..Selection::default() };
        assert!(takes(&begins, "load.x", &plain) && takes(&begins, "ähnlich", &plain));
        assert!(!takes(&begins, "load", &plain) && !takes(&begins, "un.load.x", &plain));
        let note = |key: &str, value: Value| Selection {
            notes: [(Box::from(key), RawJson::from(&value))].into(),
            ..Selection::default()
        };
        assert!(takes(&note("queue", "gpu".into()), "a", &gpu) && takes(&note("size", 3.into()), "a", &gpu));
        for refused in [note("queue", "cpu".into()), note("size", "3".into()), note("absent", Value::Null)] {
            assert!(!takes(&refused, "a", &gpu), "{refused:?}");
        }
        let both = Selection { notes: note("queue", "gpu".into()).notes, ..begins };
        assert!(takes(&both, "load.x", &gpu) && !takes(&both, "load.x", &plain) && !takes(&both, "x", &gpu));
    }

    #[test]
    fn notes_are_compared_as_json() {
        let mut odd = node(NodeUpdate::pending());
        odd.metadata.insert("where", RawJson::parse(r#"{ "b":[1, 2],"a" :"x" }"#).unwrap());
        let asked = serde_json::json!({ "a": "x", "b": [1, 2] });
        let selection = Selection { notes: [(Box::from("where"), RawJson::from(&asked))].into(), ..Selection::default() };
        assert!(selection.takes(&NodeId::new("n").unwrap(), &odd));
    }

    #[test]
    fn every_number_is_itself() {
        for number in [0.1, 0.955_639_567_209_262_7, 1e-7, f64::MAX, 1.0 / 3.0] {
            let node = node(NodeUpdate::pending().metadata("f", number));
            assert_eq!(node.metadata.get("f").unwrap().read::<f64>().unwrap().to_bits(), f64::to_bits(number), "{number}");
            // As it is, and as somebody wrote it who sets blanks.
            for text in [Value::from(number).to_string(), format!(" {} ", Value::from(number))] {
                let selection =
                    Selection { notes: [(Box::from("f"), RawJson::parse(&text).unwrap())].into(), ..Selection::default() };
                assert!(selection.takes(&NodeId::new("n").unwrap(), &node), "{number}");
            }
        }
    }
}
