//! A node as it is written: what it was found as, with what is no longer true of it said anew; and beside it what its object cannot say.

use std::borrow::Cow;
use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::kept;
use super::node::{Dialect, Found, read, told_fields};
use super::stamp::{self, Style};
use super::text::{self, Members, elements, get, string};
use super::values::{
    Form, bounds, count, duration_ms, fingerprint, interval, is_whole_number, list, millis, notes, partition, token,
};
use crate::model::{Attempt, Fingerprint, Interval, IntervalSet, NodeId, NodeState, NodeStatus, PartitionKey, RunId, time};

/// Where a node stands in the document that is written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    /// The node.
    pub(super) id: &'a NodeId,
    /// The run in which it got there.
    pub(super) run: &'a RunId,
    /// The run that the document's top level is about.
    pub(super) top: &'a RunId,
    /// Whose words are used.
    pub(super) dialect: Dialect,
}

/// Members of an object as they are written, compact.
pub(super) struct ObjectWriter<'a> {
    out: &'a mut Vec<u8>,
    empty: bool,
}

impl<'a> ObjectWriter<'a> {
    pub(super) fn begin(out: &'a mut Vec<u8>) -> Self {
        out.push(b'{');
        Self { out, empty: true }
    }

    /// Begins a member; its value is to be written next.
    pub(super) fn key(&mut self, key: &str) -> serde_json::Result<&mut Vec<u8>> {
        if !self.empty {
            self.out.push(b',');
        }
        self.empty = false;
        serde_json::to_writer(&mut *self.out, key)?;
        self.out.push(b':');
        Ok(self.out)
    }

    pub(super) fn raw(&mut self, key: &str, raw: &str) -> serde_json::Result<()> {
        self.key(key)?.extend_from_slice(raw.as_bytes());
        Ok(())
    }

    pub(super) fn value(&mut self, key: &str, value: &(impl Serialize + ?Sized)) -> serde_json::Result<()> {
        let out = self.key(key)?;
        serde_json::to_writer(out, value)
    }

    pub(super) fn end(self) {
        self.out.push(b'}');
    }
}

/// What of a node its object does not say: names of fields and their values as JSON text.
pub(super) type Overrides = Vec<(&'static str, String)>;

/// Writes a node's object, and says what it leaves unsaid.
pub(super) fn write(out: &mut Vec<u8>, node: &NodeState, place: Place<'_>) -> serde_json::Result<Overrides> {
    let start = out.len();
    match &node.extra {
        None if place.dialect == Dialect::Guide => {
            write_own(out, node, place)?;
            if speaks_plainly(node) {
                return Ok(Vec::new());
            }
        }
        None => write_over(out, &Vec::new(), node, place)?,
        Some(extra) => {
            let members = text::members(extra.as_str()).unwrap_or_default();
            write_over(out, &members, node, place)?;
        }
    }
    let written = out.get(start..).and_then(|bytes| std::str::from_utf8(bytes).ok()).unwrap_or("{}");
    let members = text::members(written)?;
    let mut unsaid = unsaid(node, &read(&members), place)?;
    if let Some(source) = &node.extra {
        unsaid.push(("kept", kept::note(source.as_str(), &members)));
    }
    Ok(unsaid)
}

/// Whether all that our own shape writes of it reads back as it is.
fn speaks_plainly(node: &NodeState) -> bool {
    let plain = |stamp: Option<DateTime<Utc>>| stamp.is_none_or(time::is_storable);
    plain(node.started_at)
        && plain(node.finished_at)
        && node.fingerprint.as_ref().is_none_or(|print| print.as_raw().as_str().starts_with(['"', '{']))
}

fn write_own(out: &mut Vec<u8>, node: &NodeState, place: Place<'_>) -> serde_json::Result<()> {
    let mut object = ObjectWriter::begin(out);
    object.value("run_id", place.run)?;
    object.value("node_id", place.id)?;
    object.value("status", &node.status)?;
    if node.attempt != 1 {
        object.value("attempt", &node.attempt)?;
    }
    object.value("duration_ms", &node.duration_ms)?;
    object.value("row_count", &node.row_count)?;
    if let Some(print) = &node.fingerprint {
        object.raw("fingerprint", print.as_raw().as_str())?;
    }
    for (key, stamp) in [("started_at", node.started_at), ("finished_at", node.finished_at)] {
        object.value(key, &stamp.map(time::format))?;
    }
    if let Some(error) = &node.error {
        object.value("error", error)?;
    }
    for (key, notes) in [("watermarks", &node.watermarks), ("metadata", &node.metadata)] {
        if !notes.is_empty() {
            object.raw(key, notes.to_raw().as_str())?;
        }
    }
    object.value("completed_intervals", &*node.intervals)?;
    object.value("completed_partitions", &*node.partitions)?;
    for key in CLAIM_MEMBERS {
        if let Some(text) = claim_member(key, node) {
            object.raw(key, &text)?;
        }
    }
    object.end();
    Ok(())
}

/// What Seeknal's reader takes for granted, and then what it may find.
const SEEKNAL_MEMBERS: &[&str] = &[
    "hash",
    "last_run",
    "status",
    "duration_ms",
    "row_count",
    "version",
    "metadata",
    "fingerprint",
    "last_watermark",
    "pg_last_watermark",
    "completed_intervals",
    "completed_partitions",
];

const GUIDE_MEMBERS: &[&str] = &[
    "run_id",
    "node_id",
    "status",
    "attempt",
    "duration_ms",
    "row_count",
    "fingerprint",
    "started_at",
    "finished_at",
    "error",
    "watermarks",
    "metadata",
    "completed_intervals",
    "completed_partitions",
];

/// What claims need, written only where there is something to say.
const CLAIM_MEMBERS: &[&str] = &["depends_on", "max_attempts", "attempts", "worker", "token"];

/// A member of [`CLAIM_MEMBERS`] as it is written; `None` leaves it out.
fn claim_member(key: &str, node: &NodeState) -> Option<String> {
    match key {
        "depends_on" => (!node.depends_on.is_empty()).then(|| json(&node.depends_on)),
        "max_attempts" => node.max_attempts.map(|most| most.to_string()),
        "attempts" => (!node.attempts.is_empty()).then(|| json(&node.attempts)),
        "worker" => node.worker.as_ref().map(json),
        "token" => node.token.map(|token| token.to_string()),
        _ => None,
    }
}

/// Writes over an object that was found: its members in their order, then what it lacks.
fn write_over(out: &mut Vec<u8>, members: &Members<'_>, node: &NodeState, place: Place<'_>) -> serde_json::Result<()> {
    let was = read(members).state;
    let mut object = ObjectWriter::begin(out);
    for (key, raw) in members {
        if let Some(text) = member(key, raw, (members, &was), node, place) {
            object.raw(key, &text)?;
        }
    }
    let lacking = match place.dialect {
        Dialect::Guide => GUIDE_MEMBERS,
        Dialect::Seeknal => SEEKNAL_MEMBERS,
    };
    // Seeknal's own shape is left as it is: there these are told beside the object.
    let claims = if place.dialect == Dialect::Guide { CLAIM_MEMBERS } else { &[] };
    for key in lacking.iter().chain(claims) {
        if get(members, key).is_none()
            && let Some(text) = new_member(key, members, node, place)
        {
            object.raw(key, &text)?;
        }
    }
    object.end();
    Ok(())
}

fn json(value: &(impl Serialize + ?Sized)) -> String {
    // Texts, numbers and lists of them: nothing in them can fail to be written.
    serde_json::to_string(value).unwrap_or_else(|_| "null".to_owned())
}

/// Whether the status is one of which `last_run` tells a stamp.
fn is_told_by_last_run(node: &NodeState) -> bool {
    node.status.is_ended() || node.status == NodeStatus::Running
}

/// The stamp that `last_run` tells: the end of what has ended, the start of what runs.
fn last_run(node: &NodeState) -> Option<DateTime<Utc>> {
    if node.status.is_ended() {
        node.finished_at
    } else if node.status == NodeStatus::Running {
        node.started_at
    } else {
        None
    }
}

/// A member that the object has, as it is written now; `None` drops it. `was`: what the whole object says, of which several members may tell one thing: as
/// long as it is the same, none of them changes.
fn member<'a>(
    key: &str,
    raw: &'a str,
    (members, was): (&Members<'_>, &NodeState),
    node: &NodeState,
    place: Place<'_>,
) -> Option<Cow<'a, str>> {
    let seeknal = place.dialect == Dialect::Seeknal;
    let keep = Some(Cow::Borrowed(raw));
    let anew = |text: String| Some(Cow::Owned(text));
    let number = |was: Option<u64>, now: Option<u64>| match now {
        now if was == now => Some(Cow::Borrowed(raw)),
        Some(now) => Some(Cow::Owned(now.to_string())),
        None => Some(Cow::Borrowed(if seeknal { "0" } else { "null" })),
    };
    let stamp = |was: Option<DateTime<Utc>>, now: Option<DateTime<Utc>>, gone: &'static str| match now {
        now if was == now => Some(Cow::Borrowed(raw)),
        Some(now) => Some(Cow::Owned(json(&style_of(raw, place.dialect).format(now)))),
        None => Some(Cow::Borrowed(gone)),
    };
    // `last_run` is the one stamp of what runs, and the other one of what has ended.
    let as_before = was.status.is_ended() == node.status.is_ended() && is_told_by_last_run(was) == is_told_by_last_run(node);
    match key {
        "run_id" => match string(raw) {
            Some(text) if RunId::new(&*text).is_ok_and(|was| was != *place.run) => anew(json(place.run)),
            _ => keep,
        },
        "status" => match string(raw).map_or(NodeStatus::Pending, |text| NodeStatus::parse(&text)) {
            was if was == node.status => keep,
            _ => anew(json(&node.status)),
        },
        "attempt" if raw.parse().unwrap_or(1_u32) != node.attempt => anew(node.attempt.to_string()),
        "started_at" if as_before && was.started_at == node.started_at => keep,
        "finished_at" if as_before && was.finished_at == node.finished_at => keep,
        "started_at" => stamp(stamp::from_json(raw), node.started_at, "null"),
        "finished_at" => stamp(stamp::from_json(raw), node.finished_at, "null"),
        // What is neither running nor ended says nothing by this stamp: it stays.
        "last_run" if last_run(node).is_none() && !is_told_by_last_run(node) => keep,
        "last_run" if as_before && last_run(was) == last_run(node) => keep,
        "last_run" => stamp(stamp::from_json_or_epoch(raw), last_run(node), "\"\""),
        "duration_ms" if was.duration_ms == node.duration_ms => keep,
        "duration_ms" => number(duration_ms(raw), node.duration_ms),
        "row_count" => number(count(raw), node.row_count),
        "duration" if was.duration_ms == node.duration_ms || get(members, "duration_ms").and_then(duration_ms).is_some() => keep,
        "duration" if millis(raw) != node.duration_ms => match node.duration_ms {
            #[expect(clippy::cast_precision_loss, reason = "seconds with a fraction are what this shape has")]
            Some(ms) => anew(json(&(ms as f64 / 1e3))),
            None => anew("null".to_owned()),
        },
        "fingerprint" => match (&fingerprint(raw), &node.fingerprint) {
            (was, now) if was == now => keep,
            (_, Some(now)) => anew(shaped(now, raw.starts_with('{') || seeknal)),
            (_, None) if seeknal => None,
            (_, None) => anew("null".to_owned()),
        },
        "error" => match (string(raw), node.error.as_deref()) {
            (was, now) if was.as_deref() == now => keep,
            (_, now) => anew(json(&now)),
        },
        "metadata" if notes(raw) != node.metadata => anew(node.metadata.to_raw().as_str().to_owned()),
        "watermarks" | "last_watermark" | "pg_last_watermark" if was.watermarks == node.watermarks => keep,
        "watermarks" if notes(raw) != node.watermarks => anew(node.watermarks.to_raw().as_str().to_owned()),
        "last_watermark" | "pg_last_watermark" => match node.watermarks.get(key) {
            Some(now) if now.as_str() != raw => anew(now.as_str().to_owned()),
            None if raw.starts_with('"') => anew("null".to_owned()),
            _ => keep,
        },
        "completed_intervals" => match elements(raw) {
            Some(listed) => {
                let was: IntervalSet = listed.iter().copied().filter_map(interval).collect();
                if was == *node.intervals { keep } else { anew(interval_list(&listed, &node.intervals, place.dialect)) }
            }
            None if node.intervals.is_empty() => keep,
            None => anew(interval_list(&[], &node.intervals, place.dialect)),
        },
        "completed_partitions" => match elements(raw) {
            Some(listed) => {
                let was: BTreeSet<PartitionKey> = listed.iter().copied().filter_map(partition).collect();
                if was == *node.partitions { keep } else { anew(partition_list(&listed, &node.partitions)) }
            }
            None if node.partitions.is_empty() => keep,
            None => anew(partition_list(&[], &node.partitions)),
        },
        "depends_on" if list::<NodeId>(raw) != node.depends_on => anew(json(&node.depends_on)),
        "attempts" if list::<Attempt>(raw) != node.attempts => anew(json(&node.attempts)),
        "max_attempts" if raw.parse().ok() != node.max_attempts => anew(json(&node.max_attempts)),
        "worker" if string(raw).as_deref() != node.worker.as_deref() => anew(json(&node.worker)),
        "token" if token(raw) != node.token => anew(json(&node.token)),
        _ => keep,
    }
}

/// A member that the object lacks; `None` leaves it out.
fn new_member(key: &str, members: &Members<'_>, node: &NodeState, place: Place<'_>) -> Option<String> {
    let seeknal = place.dialect == Dialect::Seeknal;
    // A node that was found in another shape is only given what a reader of this one cannot do without.
    let whole = seeknal && members.is_empty();
    let style = if seeknal { Style::NAIVE } else { Style::ZONED };
    let stamp = |stamp: Option<DateTime<Utc>>| stamp.map(|stamp| json(&style.format(stamp)));
    let empty = |text: &str| whole.then(|| text.to_owned());
    match key {
        "run_id" => (place.run != place.top || members.is_empty()).then(|| json(place.run)),
        "node_id" => members.is_empty().then(|| json(place.id)),
        "hash" => Some("\"\"".to_owned()),
        "last_run" => Some(stamp(last_run(node)).unwrap_or_else(|| "\"\"".to_owned())),
        "status" => (seeknal || node.status != NodeStatus::Pending).then(|| json(&node.status)),
        "attempt" => (node.attempt != 1).then(|| node.attempt.to_string()),
        "duration_ms" if get(members, "duration").is_some() && !seeknal => None,
        "duration_ms" => node.duration_ms.map(|ms| ms.to_string()).or_else(|| empty("0")),
        "row_count" => node.row_count.map(|rows| rows.to_string()).or_else(|| empty("0")),
        "version" => empty("1"),
        "started_at" if node.status == NodeStatus::Running && get(members, "last_run").is_some() => None,
        "finished_at" if node.status.is_ended() && get(members, "last_run").is_some() => None,
        "started_at" => stamp(node.started_at),
        "finished_at" => stamp(node.finished_at),
        "fingerprint" => node.fingerprint.as_ref().map(|print| shaped(print, seeknal)),
        "error" => node.error.as_ref().map(json),
        "last_watermark" | "pg_last_watermark" => node
            .watermarks
            .get(key)
            .filter(|value| value.as_str().starts_with('"'))
            .map(|value| value.as_str().to_owned())
            .or_else(|| empty("null")),
        "watermarks" => {
            let told = |name: &str| get(members, name).is_some();
            node.watermarks.iter().any(|(name, _)| !told(name)).then(|| node.watermarks.to_raw().as_str().to_owned())
        }
        "metadata" if node.metadata.is_empty() => empty("{}"),
        "metadata" => Some(node.metadata.to_raw().as_str().to_owned()),
        "completed_intervals" if node.intervals.is_empty() => empty("[]"),
        "completed_intervals" => Some(interval_list(&[], &node.intervals, place.dialect)),
        "completed_partitions" if node.partitions.is_empty() => empty("[]"),
        "completed_partitions" => Some(partition_list(&[], &node.partitions)),
        _ => claim_member(key, node),
    }
}

fn style_of(raw: &str, dialect: Dialect) -> Style {
    match string(raw) {
        Some(text) if stamp::parse(&text).is_some() => Style::of(&text),
        _ if dialect == Dialect::Seeknal => Style::NAIVE,
        _ => Style::ZONED,
    }
}

/// A fingerprint in the shape that is wanted: a text is put into an object where readers expect one.
fn shaped(print: &Fingerprint, object: bool) -> String {
    if object && !print.is_object() {
        return format!("{{\"content_hash\":{}}}", print.as_raw().as_str());
    }
    print.as_raw().as_str().to_owned()
}

/// A list of intervals that says what the set says: elements that still hold stay as they are, in their order; what is gone is cut out
/// of those that do not; what is new comes last, in the list's own style. Elements that are not understood stay.
fn interval_list(listed: &[&str], now: &IntervalSet, dialect: Dialect) -> String {
    let first = listed.iter().find_map(|raw| interval(raw).and_then(|_| bounds(raw)));
    let (form, style) =
        first.map_or_else(|| (Form::Pair, style_of("null", dialect)), |(form, start, _)| (form, Style::of(&start)));
    let pair = |interval: Interval| {
        let (start, end) = (style.format(interval.start()), style.format(interval.end()));
        match form {
            Form::Pair => json(&(start, end)),
            Form::Named => format!("{{\"start\":{},\"end\":{}}}", json(&start), json(&end)),
            Form::Text => json(&format!("{start}/{end}")),
        }
    };
    let mut told = IntervalSet::new();
    let mut list: Vec<Cow<'_, str>> = Vec::with_capacity(listed.len() + 1);
    for raw in listed {
        match interval(raw) {
            None => list.push(Cow::Borrowed(raw)),
            Some(whole) if now.contains(whole) => {
                told.insert(whole);
                list.push(Cow::Borrowed(raw));
            }
            Some(cut) => {
                let rest = now.intersection(&std::iter::once(cut).collect());
                list.extend(rest.iter().map(|part| Cow::Owned(pair(part))));
                told.extend(rest.iter());
            }
        }
    }
    list.extend(now.difference(&told).iter().map(|new| Cow::Owned(pair(new))));
    format!("[{}]", list.join(","))
}

/// A list of partitions that says what the set says, in the order that it had; new ones come last, as numbers where all of them are.
fn partition_list(listed: &[&str], now: &BTreeSet<PartitionKey>) -> String {
    let mut told = BTreeSet::new();
    let mut list: Vec<Cow<'_, str>> = Vec::with_capacity(now.len());
    for raw in listed {
        match partition(raw) {
            None => list.push(Cow::Borrowed(raw)),
            Some(key) if now.contains(&key) => {
                list.push(Cow::Borrowed(raw));
                told.insert(key);
            }
            Some(_) => {}
        }
    }
    let numbers = !listed.is_empty() && listed.iter().all(|raw| is_whole_number(raw));
    let new = |key: &PartitionKey| if numbers && is_whole_number(key.as_str()) { key.to_string() } else { json(key) };
    list.extend(now.difference(&told).map(|key| Cow::Owned(new(key))));
    format!("[{}]", list.join(","))
}

/// The fields of a node that its written object does not give back.
fn unsaid(node: &NodeState, found: &Found, place: Place<'_>) -> serde_json::Result<Overrides> {
    let mut all: Overrides = Vec::new();
    let told = &found.state;
    if found.run.as_ref().unwrap_or(place.top) != place.run {
        all.push(("run_id", serde_json::to_string(place.run)?));
    }
    macro_rules! unless_same {
        ($($field:ident),+) => {
            $(if node.$field != told.$field {
                all.push((stringify!($field), serde_json::to_string(&node.$field)?));
            })+
        };
    }
    told_fields!(unless_same);
    Ok(all)
}

/// A node's object as it would be written.
pub(super) fn text(node: &NodeState, place: Place<'_>) -> serde_json::Result<String> {
    let mut out = Vec::new();
    write(&mut out, node, place)?;
    // It was written as text just now.
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// What a node's object says of it, as it would be written.
pub(super) fn as_told(node: &NodeState, place: Place<'_>) -> serde_json::Result<NodeState> {
    let written = text(node, place)?;
    Ok(read(&text::members(&written)?).state)
}
