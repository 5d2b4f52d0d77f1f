//! Runs, nodes, and what outlives them, in the statements of a batch: many rows each.

use serde_json::Error;

use super::answer::Before;
use super::hrana::Stmt;
use super::rows::{JsonRows, Number, metadata_text, row, stamp_text};
use super::write::Request;
use crate::model::{NodeId, NodeState, RawJson, RunHeader, RunId, Version};
use crate::store::columns::{fingerprint_text, list_text};
use crate::store::decide::{Head, NodeWrite, RunWrite, Writes};
use crate::store::rewrite::{Rewrite, rewrites};

/// The rows of all runs, kind by kind.
#[derive(Default)]
struct RunRows {
    deleted: JsonRows,
    tombstones: JsonRows,
    made: JsonRows,
    headers: JsonRows,
    versions: JsonRows,
    cleared: JsonRows,
    nodes_gone: JsonRows,
    nodes: JsonRows,
    stretches_gone: JsonRows,
    islands: JsonRows,
    partitions_gone: JsonRows,
    partitions: JsonRows,
}

/// Everything of runs, kind by kind: what goes before what comes, nodes before the version of their run.
pub(super) fn runs(request: &mut Request, writes: &Writes, before: &Before) -> Result<(), Error> {
    let mut rows = RunRows::default();
    for (run, write) in &writes.runs {
        rows.run(run, write, before)?;
    }
    let RunRows {
        deleted,
        tombstones,
        made,
        headers,
        versions,
        cleared,
        nodes_gone,
        nodes,
        stretches_gone,
        islands,
        partitions_gone,
        partitions,
    } = rows;
    for list in deleted.into_lists() {
        for sql in [
            "DELETE FROM node_states WHERE run_id IN (SELECT value->>0 FROM json_each(?1))",
            "DELETE FROM completed_intervals WHERE run_id IN (SELECT value->>0 FROM json_each(?1))",
            "DELETE FROM partitions WHERE run_id IN (SELECT value->>0 FROM json_each(?1))",
            "DELETE FROM runs WHERE run_id IN (SELECT value->>0 FROM json_each(?1))",
        ] {
            request.statements.push(Stmt::exec(sql, vec![list.as_str().into()]));
        }
    }
    request.exec(
        "INSERT OR REPLACE INTO tombstones (run_id, version, deleted_at) SELECT value->>0, value->>1, unixepoch() FROM json_each(?1)",
        tombstones,
    );
    request.exec(
        "INSERT INTO runs (run_id, status, created_at, started_at, finished_at, worker, metadata, extra, version, created_version, \
         header_version, nodes_deleted_version) \
         SELECT value->>0, value->>1, value->>2, value->>3, value->>4, value->>5, value->>6, value->>7, value->>8, value->>9, value->>10, \
         value->>11 FROM json_each(?1)",
        made,
    );
    for list in cleared.into_lists() {
        for sql in [
            "DELETE FROM completed_intervals WHERE (run_id, node_id) IN (SELECT value->>0, value->>1 FROM json_each(?1))",
            "DELETE FROM partitions WHERE (run_id, node_id) IN (SELECT value->>0, value->>1 FROM json_each(?1))",
        ] {
            request.statements.push(Stmt::exec(sql, vec![list.as_str().into()]));
        }
    }
    request
        .exec("DELETE FROM node_states WHERE (run_id, node_id) IN (SELECT value->>0, value->>1 FROM json_each(?1))", nodes_gone);
    // run_created_at never changes, so that an update leaves the index alone.
    request.exec(
        "INSERT INTO node_states (run_id, node_id, version, status, attempt, started_at, finished_at, duration_ms, row_count, fingerprint, \
         error, watermarks, metadata, extra, depends_on, max_attempts, attempts, worker, token, run_created_at) \
         SELECT r.run_id, w.value->>1, CASE WHEN w.value->>2 THEN w.value->>3 ELSE r.version + (w.value->>3) END, w.value->>4, w.value->>5, \
         w.value->>6, w.value->>7, w.value->>8, w.value->>9, w.value->>10, w.value->>11, w.value->>12, w.value->>13, w.value->>14, \
         w.value->>15, w.value->>16, w.value->>17, w.value->>18, w.value->>19, r.created_at \
         FROM json_each(?1) AS w CROSS JOIN runs AS r ON r.run_id = w.value->>0 WHERE 1 \
         ON CONFLICT (run_id, node_id) DO UPDATE SET version = excluded.version, status = excluded.status, attempt = excluded.attempt, \
         started_at = excluded.started_at, finished_at = excluded.finished_at, duration_ms = excluded.duration_ms, \
         row_count = excluded.row_count, fingerprint = excluded.fingerprint, error = excluded.error, watermarks = excluded.watermarks, \
         metadata = excluded.metadata, extra = excluded.extra, depends_on = excluded.depends_on, max_attempts = excluded.max_attempts, \
         attempts = excluded.attempts, worker = excluded.worker, token = excluded.token",
        nodes,
    );
    request.exec(
        "DELETE FROM completed_intervals WHERE (run_id, node_id, start_at) IN ( \
         SELECT i.run_id, i.node_id, i.start_at FROM json_each(?1) AS w CROSS JOIN completed_intervals AS i \
         ON i.run_id = w.value->>0 AND i.node_id = w.value->>1 AND i.start_at BETWEEN w.value->>2 AND w.value->>3)",
        stretches_gone,
    );
    request.exec(
        "INSERT OR REPLACE INTO completed_intervals (run_id, node_id, start_at, end_at) \
         SELECT value->>0, value->>1, value->>2, value->>3 FROM json_each(?1)",
        islands,
    );
    request.exec(
        "DELETE FROM partitions WHERE (run_id, node_id, partition) IN (SELECT value->>0, value->>1, value->>2 FROM json_each(?1))",
        partitions_gone,
    );
    request.exec(
        "INSERT OR IGNORE INTO partitions (run_id, node_id, partition) SELECT value->>0, value->>1, value->>2 FROM json_each(?1)",
        partitions,
    );
    request.exec(
        "UPDATE runs SET status = w.value->>4, started_at = w.value->>5, finished_at = w.value->>6, worker = w.value->>7, \
         metadata = w.value->>8, extra = w.value->>9, header_version = version + (w.value->>3), \
         nodes_deleted_version = coalesce(version + (w.value->>2), nodes_deleted_version), version = version + (w.value->>1) \
         FROM json_each(?1) AS w WHERE runs.run_id = w.value->>0",
        headers,
    );
    request.exec(
        "UPDATE runs SET nodes_deleted_version = coalesce(version + (w.value->>2), nodes_deleted_version), version = version + (w.value->>1) \
         FROM json_each(?1) AS w WHERE runs.run_id = w.value->>0",
        versions,
    );
    Ok(())
}

fn worker_text(header: &RunHeader) -> Result<Option<String>, Error> {
    header.worker.as_ref().map(serde_json::to_string).transpose()
}

impl RunRows {
    fn run(&mut self, run: &RunId, write: &RunWrite, before: &Before) -> Result<(), Error> {
        if let Some(version) = write.deleted {
            if write.existed {
                row!(self.deleted, run);
            }
            row!(self.tombstones, run, version);
        }
        let Some(head) = &write.head else { return Ok(()) };
        let base = before.versions.get(run).copied().filter(|_| write.deleted.is_none());
        match (base, &write.header) {
            (None, Some(header)) => self.make(run, head, header)?,
            // A run without a row is always made with all of its header.
            (None, None) => {}
            (Some(base), header) => self.update(run, head, header.as_ref(), base)?,
        }
        for (id, node) in &write.nodes {
            self.node(run, id, node, base)?;
        }
        Ok(())
    }

    fn make(&mut self, run: &RunId, head: &Head, header: &RunHeader) -> Result<(), Error> {
        row!(
            self.made,
            run,
            header.status.as_str(),
            stamp_text(head.created_at),
            header.started_at.map(stamp_text),
            header.finished_at.map(stamp_text),
            worker_text(header)?,
            metadata_text(&header.metadata),
            header.extra.as_ref().map(RawJson::as_str),
            head.version,
            head.created_version,
            head.header_version,
            head.nodes_deleted,
        );
        Ok(())
    }

    fn update(&mut self, run: &RunId, head: &Head, header: Option<&RunHeader>, base: u64) -> Result<(), Error> {
        let moved = |version: Version| version.0.saturating_sub(base);
        let nodes_deleted = Some(moved(head.nodes_deleted)).filter(|moved| *moved > 0);
        let Some(header) = header else {
            row!(self.versions, run, moved(head.version), nodes_deleted);
            return Ok(());
        };
        row!(
            self.headers,
            run,
            moved(head.version),
            nodes_deleted,
            moved(head.header_version),
            header.status.as_str(),
            header.started_at.map(stamp_text),
            header.finished_at.map(stamp_text),
            worker_text(header)?,
            metadata_text(&header.metadata),
            header.extra.as_ref().map(RawJson::as_str),
        );
        Ok(())
    }

    /// `base`: the version of the run that the node's version is told beyond; none for a run that is made.
    fn node(&mut self, run: &RunId, id: &NodeId, write: &NodeWrite, base: Option<u64>) -> Result<(), Error> {
        if base.is_some() && (write.whole || write.state.is_none()) {
            row!(self.cleared, run, id);
        }
        let Some(state) = write.state.as_deref() else {
            row!(self.nodes_gone, run, id);
            return Ok(());
        };
        self.put_node(run, id, state, base)?;
        if write.whole {
            for island in state.intervals.iter() {
                row!(self.islands, run, id, stamp_text(island.start()), stamp_text(island.end()));
            }
            for partition in state.partitions.iter() {
                row!(self.partitions, run, id, partition);
            }
            return Ok(());
        }
        for Rewrite { from, to, islands } in rewrites(&state.intervals, &write.intervals) {
            row!(self.stretches_gone, run, id, stamp_text(from), stamp_text(to));
            for island in islands {
                row!(self.islands, run, id, stamp_text(island.start()), stamp_text(island.end()));
            }
        }
        for partition in &write.partitions {
            let list = if state.partitions.contains(partition) { &mut self.partitions } else { &mut self.partitions_gone };
            row!(list, run, id, partition);
        }
        Ok(())
    }

    fn put_node(&mut self, run: &RunId, id: &NodeId, state: &NodeState, base: Option<u64>) -> Result<(), Error> {
        // A node that is written but not changed keeps its version.
        let moved = base.and_then(|base| state.version.0.checked_sub(base)).filter(|moved| *moved > 0);
        row!(
            self.nodes,
            run,
            id,
            u8::from(moved.is_none()),
            moved.unwrap_or(state.version.0),
            state.status.as_str(),
            state.attempt,
            state.started_at.map(stamp_text),
            state.finished_at.map(stamp_text),
            state.duration_ms.map(Number),
            state.row_count.map(Number),
            state.fingerprint.as_ref().map(fingerprint_text),
            state.error,
            metadata_text(&state.watermarks),
            metadata_text(&state.metadata),
            state.extra.as_ref().map(RawJson::as_str),
            list_text(&state.depends_on)?,
            state.max_attempts,
            list_text(&state.attempts)?,
            state.worker,
            state.token.map(|token| Number(token.0)),
        );
        Ok(())
    }
}

/// What outlives deleted runs joins what is there, inside the statement: nobody's is lost when two delete at the same time.
pub(super) fn retained(request: &mut Request, writes: &Writes) -> Result<(), Error> {
    let (mut islands, mut partitions, mut successes) = <(JsonRows, JsonRows, JsonRows)>::default();
    for (node, retained) in &writes.retained {
        for island in retained.coverage.intervals.iter() {
            row!(islands, node, stamp_text(island.start()), stamp_text(island.end()));
        }
        for partition in &retained.coverage.partitions {
            row!(partitions, node, partition);
        }
        if let Some(success) = &retained.last_success {
            row!(
                successes,
                node,
                success.run_id,
                stamp_text(success.run_created_at),
                success.finished_at.map(stamp_text),
                success.fingerprint.as_ref().map(fingerprint_text),
                success.row_count.map(Number),
                metadata_text(&success.watermarks),
            );
        }
    }
    request.exec(
        "INSERT INTO coverage (node_id, start_at, end_at) SELECT value->>0, value->>1, value->>2 FROM json_each(?1) WHERE 1 \
         ON CONFLICT (node_id, start_at) DO UPDATE SET end_at = max(end_at, excluded.end_at)",
        islands,
    );
    request.exec(
        "INSERT OR IGNORE INTO coverage_partitions (node_id, partition) SELECT value->>0, value->>1 FROM json_each(?1)",
        partitions,
    );
    request.exec(
        "INSERT INTO last_success (node_id, run_id, run_created_at, finished_at, fingerprint, row_count, watermarks) \
         SELECT value->>0, value->>1, value->>2, value->>3, value->>4, value->>5, value->>6 FROM json_each(?1) WHERE 1 \
         ON CONFLICT (node_id) DO UPDATE SET run_id = excluded.run_id, run_created_at = excluded.run_created_at, \
         finished_at = excluded.finished_at, fingerprint = excluded.fingerprint, row_count = excluded.row_count, \
         watermarks = excluded.watermarks \
         WHERE (excluded.run_created_at, excluded.run_id, ifnull(excluded.finished_at, '')) \
         >= (last_success.run_created_at, last_success.run_id, ifnull(last_success.finished_at, ''))",
        successes,
    );
    Ok(())
}
