//! Proves from the notes of many processes that no acknowledged write was lost and none was applied twice.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

/// How a node is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// Read, then written with one more if nobody else wrote it meanwhile.
    Guarded,
    /// Read under a lock, then written with one more, fenced by the lock.
    Fenced,
    /// Written by one task alone, with one more each time.
    Own,
}

/// What became of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Told {
    Done {
        seq: u64,
        before: u64,
        after: u64,
    },
    /// Refused because the lease was lost.
    Fenced,
    /// Refused because somebody else was faster.
    Conflict,
    /// It failed, and nothing was written.
    Failed,
    /// Nobody knows.
    Unknown,
}

/// One note.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Line {
    pub(crate) worker: String,
    pub(crate) kind: Kind,
    pub(crate) node: String,
    /// The number that was written.
    pub(crate) value: u64,
    pub(crate) told: Told,
}

/// What is stored at the end.
#[derive(Debug, Clone)]
pub(crate) struct Final {
    /// The run's version before the first write.
    pub(crate) first: u64,
    pub(crate) last: u64,
    /// The number of every node.
    pub(crate) nodes: BTreeMap<String, u64>,
}

/// What the notes say together.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    pub(crate) acknowledged: u64,
    pub(crate) refused_by_fence: u64,
    conflicts: u64,
    failed: u64,
    unknown: u64,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { acknowledged, refused_by_fence, conflicts, failed, unknown } = self;
        write!(
            f,
            "{acknowledged} acknowledged, {refused_by_fence} refused by the fence, {conflicts} conflicts, {failed} failed, {unknown} unknown; \
             lost 0, twice 0"
        )
    }
}

/// Finds the first note that cannot be true.
pub(crate) fn check(lines: &[Line], end: &Final) -> Result<Summary, String> {
    let mut summary = Summary::default();
    let (mut seqs, mut versions) = (BTreeSet::new(), BTreeSet::new());
    // By node: what was acknowledged, in the order of commits; and how often nobody knew.
    let mut acknowledged: BTreeMap<&str, BTreeMap<u64, u64>> = BTreeMap::new();
    let mut unknown: BTreeMap<&str, u64> = BTreeMap::new();
    let mut last_seq: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for line in lines {
        match line.told {
            Told::Done { seq, before, after } => {
                summary.acknowledged += 1;
                if after != before + 1 || before < end.first || after > end.last {
                    return Err(format!("versions {before} to {after} do not lie in {} to {}: {line:?}", end.first, end.last));
                }
                if !seqs.insert(seq) {
                    return Err(format!("the commit sequence {seq} was given twice: {line:?}"));
                }
                if !versions.insert(after) {
                    return Err(format!("two writes were told that they made version {after}: {line:?}"));
                }
                acknowledged.entry(&line.node).or_default().insert(seq, line.value);
                if let Some(earlier) = last_seq.insert((&line.worker, &line.node), seq)
                    && earlier > seq
                {
                    return Err(format!("a later write of the same worker came before an earlier one: {line:?}"));
                }
            }
            Told::Fenced => summary.refused_by_fence += 1,
            Told::Conflict => summary.conflicts += 1,
            Told::Failed => summary.failed += 1,
            Told::Unknown => {
                summary.unknown += 1;
                *unknown.entry(&line.node).or_default() += 1;
            }
        }
    }
    let grown = end.last - end.first;
    if grown < summary.acknowledged || grown > summary.acknowledged + summary.unknown {
        return Err(format!(
            "the run grew by {grown} versions for {} acknowledged and {} unknown writes",
            summary.acknowledged, summary.unknown
        ));
    }
    for (node, values) in &acknowledged {
        let unknown = unknown.get(node).copied().unwrap_or(0);
        let mut before = 0;
        for (seq, value) in values {
            if *value <= before {
                return Err(format!("node {node}: a write was lost: {value} was written after {before} (sequence {seq})"));
            }
            before = *value;
        }
        let stored = end.nodes.get(*node).copied().unwrap_or(0);
        let count = values.len() as u64;
        if stored < before || stored > before + unknown {
            return Err(format!("node {node}: {stored} is stored, {before} was acknowledged last, {unknown} are unknown"));
        }
        // Every one is one more than the one before: so the number counts the writes.
        if stored < count || stored > count + unknown {
            return Err(format!("node {node}: {stored} is stored after {count} acknowledged and {unknown} unknown writes"));
        }
    }
    Ok(summary)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(node: &str, value: u64, seq: u64) -> Line {
        let told = Told::Done { seq, before: seq, after: seq + 1 };
        Line { worker: "w".to_owned(), kind: Kind::Guarded, node: node.to_owned(), value, told }
    }

    fn end(last: u64, nodes: &[(&str, u64)]) -> Final {
        Final { first: 1, last, nodes: nodes.iter().map(|(node, value)| ((*node).to_owned(), *value)).collect() }
    }

    #[test]
    fn what_is_true_passes() {
        let lines = [done("a", 1, 1), done("b", 1, 2), done("a", 2, 3)];
        assert_eq!(check(&lines, &end(4, &[("a", 2), ("b", 1)])).unwrap().acknowledged, 3);
        let unknown = Line { told: Told::Unknown, ..done("a", 3, 9) };
        let lines = [lines[0].clone(), lines[1].clone(), lines[2].clone(), unknown];
        for (last, a) in [(4, 2), (5, 3)] {
            check(&lines, &end(last, &[("a", a), ("b", 1)])).unwrap();
        }
    }

    #[test]
    fn a_lost_update_is_found() {
        // Both read 0 and wrote 1.
        let lines = [done("a", 1, 1), done("a", 1, 2)];
        let problem = check(&lines, &end(3, &[("a", 1)])).unwrap_err();
        assert!(problem.contains("was lost"), "{problem}");
    }

    #[test]
    fn a_write_that_is_not_stored_or_is_stored_twice_is_found() {
        let lines = [done("a", 1, 1), done("a", 2, 2)];
        assert!(check(&lines, &end(3, &[("a", 1)])).is_err(), "the last one is gone");
        assert!(check(&lines, &end(3, &[])).is_err(), "all are gone");
        assert!(check(&lines, &end(3, &[("a", 3)])).is_err(), "one was applied twice");
        assert!(check(&lines, &end(4, &[("a", 2)])).is_err(), "there is a version that nobody wrote");
        assert!(check(&lines, &end(2, &[("a", 2)])).is_err(), "there is one too few");
    }

    #[test]
    fn numbers_that_are_given_twice_or_out_of_order_are_found() {
        let twice = Line { told: Told::Done { seq: 2, before: 2, after: 3 }, ..done("b", 1, 1) };
        assert!(check(&[done("a", 1, 2), twice], &end(4, &[("a", 1), ("b", 1)])).unwrap_err().contains("twice"));
        let same = Line { told: Told::Done { seq: 3, before: 1, after: 2 }, ..done("b", 1, 1) };
        assert!(check(&[done("a", 1, 1), same], &end(3, &[("a", 1), ("b", 1)])).unwrap_err().contains("version 2"));
        let lines = [done("a", 1, 2), done("a", 2, 1)];
        assert!(check(&lines, &end(3, &[("a", 2)])).unwrap_err().contains("earlier"));
    }
}
