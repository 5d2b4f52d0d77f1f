//! The statement that puts nodes down. Most nodes leave most columns empty: a group of columns that is empty in all rows of a batch is not sent, and
//! cleared by the statement itself, which costs the server a fifth less than arrays of nothing.

use std::sync::LazyLock;

use crate::model::NodeState;

/// A column: its name, the type of its values as they are sent, and what makes them its own.
type Column = (&'static str, &'static str, &'static str);

/// What every node has.
const ALWAYS: [Column; 9] = [
    ("run_id", "text", ""),
    ("node_id", "text", ""),
    ("status", "text", ""),
    ("attempt", "bigint", ""),
    ("started_at", "timestamptz", ""),
    ("finished_at", "timestamptz", ""),
    ("row_count", "text", "::numeric"),
    ("version", "bigint", ""),
    ("run_created_at", "timestamptz", ""),
];

pub(super) const DURATION: usize = 0;
pub(super) const NOTES: usize = 1;
pub(super) const PLAN: usize = 2;
pub(super) const CLAIM: usize = 3;

const GROUPS: [&[Column]; 4] = [
    &[("duration_ms", "text", "::numeric")],
    &[
        ("fingerprint", "text", ""),
        ("error", "text", ""),
        ("watermarks", "text", ""),
        ("metadata", "text", ""),
        ("extra", "text", ""),
    ],
    &[("depends_on", "text", ""), ("max_attempts", "bigint", ""), ("attempts", "text", "")],
    &[("worker", "text", ""), ("token", "bigint", "")],
];

/// Which groups hold anything in any row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Filled(usize);

impl Filled {
    pub(super) fn has(self, group: usize) -> bool {
        self.0 & (1 << group) != 0
    }

    fn with(self, group: usize, any: bool) -> Self {
        Self(self.0 | usize::from(any) << group)
    }
}

/// Looks at all rows.
pub(super) fn filled<'a>(nodes: impl Iterator<Item = &'a NodeState>) -> Filled {
    nodes.fold(Filled::default(), |filled, node| {
        let notes = node.fingerprint.is_some()
            || node.error.is_some()
            || !node.watermarks.is_empty()
            || !node.metadata.is_empty()
            || node.extra.is_some();
        let plan = !node.depends_on.is_empty() || node.max_attempts.is_some() || !node.attempts.is_empty();
        filled
            .with(DURATION, node.duration_ms.is_some())
            .with(NOTES, notes)
            .with(PLAN, plan)
            .with(CLAIM, node.worker.is_some() || node.token.is_some())
    })
}

/// The statement for these groups. Its values are those of [`ALWAYS`], then those of each group, in order.
pub(super) fn statement(filled: Filled) -> &'static str {
    static TEXTS: LazyLock<Vec<String>> = LazyLock::new(|| all(|filled| text(filled, 0, "")));
    TEXTS.get(filled.0).map_or("", String::as_str)
}

/// For each set of groups, in the order of their numbers.
pub(super) fn all(text: impl FnMut(Filled) -> String) -> Vec<String> {
    (0..1 << GROUPS.len()).map(Filled).map(text).collect()
}

impl Filled {
    /// Its place among [`all`].
    pub(super) fn number(self) -> usize {
        self.0
    }
}

/// The same behind so many other values, and together with another table.
pub(super) fn text(filled: Filled, values: usize, beside: &str) -> String {
    let groups = || (0..).zip(GROUPS);
    let sent: Vec<Column> =
        ALWAYS.into_iter().chain(groups().filter(|(at, _)| filled.has(*at)).flat_map(|(_, group)| group).copied()).collect();
    let list = |of: &dyn Fn(usize, &Column) -> String| {
        sent.iter().enumerate().map(|(at, column)| of(at, column)).collect::<Vec<_>>().join(", ")
    };
    let names = list(&|_, (name, ..)| (*name).to_owned());
    // run_created_at does not change while its run lives: an update leaves its index alone.
    let set = sent.iter().filter(|(name, ..)| !["run_id", "node_id", "run_created_at"].contains(name));
    let set = set.map(|(name, ..)| format!("{name} = excluded.{name}"));
    let cleared =
        groups().filter(|(at, _)| !filled.has(*at)).flat_map(|(_, group)| group).map(|(name, ..)| format!("{name} = NULL"));
    format!(
        "INSERT INTO node_states ({names}) SELECT {} FROM unnest({}) AS k ({names}){beside} ON CONFLICT (run_id, node_id) DO UPDATE SET {}",
        list(&|_, (name, _, cast)| format!("k.{name}{cast}")),
        list(&|at, (_, kind, _)| format!("${}::{kind}[]", values + at + 1)),
        set.chain(cleared).collect::<Vec<_>>().join(", "),
    )
}
