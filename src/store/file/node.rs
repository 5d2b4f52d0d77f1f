//! One node as a JSON object: read from every shape there is, and written so that what has not changed keeps its own words.
//!
//! A node from a foreign file keeps its whole object in [`NodeState::extra`]. On writing, each of its members is written as it was if
//! it still means what the model says, else anew in its own style. What the object cannot say is told beside it, in `seeknal_state`,
//! as an override: found by reading the written object again, so that opening gives back exactly what was written.

use std::sync::Arc;

use super::stamp;
use super::text::{Members, get, string};
use super::values::{count, duration_ms, fingerprint, intervals, list, millis, notes, partitions, token};
use crate::model::{NodeState, NodeStatus, RawJson, RunId};

/// Whose words a document speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    /// Our shape, which is that of Seeknal's "State Backends Guide".
    Guide,
    /// Seeknal's own files.
    Seeknal,
}

/// A node as it was found.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) state: NodeState,
    /// The run that the object itself names.
    pub(super) run: Option<RunId>,
    /// How many completed intervals and partitions are not understood.
    pub(super) unread: usize,
}

/// Reads a node's object. A field that makes no sense is left at its default: its text stays in the object.
pub(super) fn read(members: &Members<'_>) -> Found {
    let status = get(members, "status").and_then(string).map_or(NodeStatus::Pending, |text| NodeStatus::parse(&text));
    let mut node = NodeState::new(status);
    let mut run = None;
    let mut last_run = None;
    let mut seconds = None;
    let mut unread = 0;
    for (key, raw) in members {
        match &**key {
            "run_id" => run = string(raw).and_then(|text| RunId::new(text).ok()),
            "attempt" => node.attempt = raw.parse().unwrap_or(1),
            "started_at" => node.started_at = stamp::from_json(raw),
            "finished_at" => node.finished_at = stamp::from_json(raw),
            "last_run" => last_run = stamp::from_json_or_epoch(raw),
            "duration_ms" => node.duration_ms = duration_ms(raw),
            "duration" => seconds = millis(raw),
            "row_count" => node.row_count = count(raw),
            "fingerprint" => node.fingerprint = fingerprint(raw),
            "error" => node.error = string(raw).map(Arc::from),
            "watermarks" => {
                for (name, value) in notes(raw).iter() {
                    node.watermarks.insert(name, value.clone());
                }
            }
            "last_watermark" | "pg_last_watermark" if raw.starts_with('"') => {
                if let Ok(value) = RawJson::parse(raw) {
                    node.watermarks.insert(key, value);
                }
            }
            "metadata" => node.metadata = notes(raw),
            "completed_intervals" => {
                let (read, not_understood) = intervals(raw);
                node.intervals = Arc::new(read);
                unread += not_understood;
            }
            "completed_partitions" => {
                let (read, not_understood) = partitions(raw);
                node.partitions = Arc::new(read);
                unread += not_understood;
            }
            "depends_on" => node.depends_on = list(raw),
            "max_attempts" => node.max_attempts = raw.parse().ok(),
            "attempts" => node.attempts = list(raw),
            "worker" => node.worker = string(raw).map(Arc::from),
            "token" => node.token = token(raw),
            _ => {}
        }
    }
    node.duration_ms = node.duration_ms.or(seconds);
    if node.status.is_ended() {
        node.finished_at = node.finished_at.or(last_run);
    } else if node.status == NodeStatus::Running {
        node.started_at = node.started_at.or(last_run);
    }
    Found { state: node, run, unread }
}

/// The fields that a node's object tells, for a macro that takes them.
macro_rules! told_fields {
    ($use:ident $(, $more:ident)*) => {
        $use!(
            status,
            attempt,
            started_at,
            finished_at,
            duration_ms,
            row_count,
            fingerprint,
            error,
            watermarks,
            metadata,
            intervals,
            partitions,
            depends_on,
            max_attempts,
            attempts,
            worker,
            token
            $(, $more)*
        )
    };
}
pub(super) use told_fields;

/// Whether a field is not the same in two nodes.
pub(super) fn differ(field: &str, a: &NodeState, b: &NodeState) -> bool {
    macro_rules! compare {
        ($($name:ident),+) => {
            match field {
                $(stringify!($name) => a.$name != b.$name,)+
                _ => false,
            }
        };
    }
    told_fields!(compare)
}

/// Sets a field of a node from an override. Fields that are not known are passed over: another version may have written them.
pub(super) fn set(node: &mut NodeState, field: &str, raw: &str) -> serde_json::Result<()> {
    macro_rules! read_field {
        ($($name:ident),+) => {
            match field {
                $(stringify!($name) => node.$name = serde_json::from_str(raw)?,)+
                _ => {}
            }
        };
    }
    told_fields!(read_field, version);
    Ok(())
}
