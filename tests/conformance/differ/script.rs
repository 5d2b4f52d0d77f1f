//! What is done, in words that every store understands: runs, nodes and locks by number, so that each store puts its own versions and tokens in.

use std::collections::BTreeMap;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use seeknal_state::model::{
    Fingerprint, Interval, Metadata, Mutation, NewRun, NodeId, NodeState, NodeStatus, NodeUpdate, PartitionKey, RawJson,
    Retained, RunHeader, RunId, RunImport, RunStatus, RunUpdate, time,
};

pub(super) const RUNS: usize = 4;
pub(super) const NODES: usize = 4;

/// Ids that differ by case, by a blank, by a quote.
pub(super) fn run_id(number: usize) -> RunId {
    RunId::new(["r", "r/ö", "R", "r "][number]).unwrap()
}

pub(super) fn node_id(number: usize) -> NodeId {
    NodeId::new(["a", "A", "n/ö", "z'\""][number]).unwrap()
}

/// splitmix64: the same everywhere, and no dependency.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.roll() % bound as u64).unwrap()
    }

    pub(super) fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    fn one_of<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }
}

#[derive(Clone, Debug)]
pub(super) enum Condition {
    Absent(usize),
    Status(usize),
    RunStatus,
    /// That many versions beyond the one that is known.
    RunVersion(u64),
    /// The known version of the node, or that it was never there.
    NodeVersion(usize, bool),
    Unlocked,
}

#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) run: usize,
    pub(super) conditions: Vec<Condition>,
    pub(super) mutations: Vec<Mutation>,
    /// Whether it brings its result with it.
    pub(super) after: bool,
}

/// Locks go by the number under which they were asked for.
#[derive(Clone, Debug)]
pub(super) enum Lock {
    Grant { run: usize, node: Option<usize>, ttl_ms: u64, lock: usize },
    Renew { lock: usize, ttl_ms: u64, wrong: bool },
    Release { lock: usize, wrong: bool },
    Force { lock: usize },
}

#[derive(Clone, Debug, Default)]
pub(super) struct Step {
    pub(super) parts: Vec<Part>,
    pub(super) locks: Vec<Lock>,
    pub(super) fences: Vec<usize>,
    pub(super) retained: Vec<(NodeId, Retained)>,
}

/// Makes the batches of one seed.
pub(super) struct Script {
    pub(super) dice: Dice,
    locks: usize,
}

impl Script {
    pub(super) fn of(seed: u64) -> Self {
        Self { dice: Dice(seed), locks: 0 }
    }

    /// `there`: the runs that whoever sends it believes to be there.
    pub(super) fn batch(&mut self, mut there: [bool; RUNS]) -> Vec<Step> {
        let hot = self.dice.below(RUNS);
        (0..=self.dice.below(6)).map(|_| self.step(hot, &mut there)).collect()
    }

    fn step(&mut self, hot: usize, there: &mut [bool; RUNS]) -> Step {
        let mut runs = Vec::new();
        if !self.dice.once_in(5) {
            runs.push(if self.dice.once_in(3) { self.dice.below(RUNS) } else { hot });
        }
        for times in [6, 9] {
            if self.dice.once_in(times) {
                runs.push(self.dice.below(RUNS));
            }
        }
        runs.sort_unstable();
        if !self.dice.once_in(40) {
            runs.dedup();
        }
        let parts = runs.into_iter().map(|run| self.part(run, &mut there[run])).collect();
        let locks = if self.dice.once_in(2) { (0..=self.dice.below(2)).map(|_| self.lock(hot)).collect() } else { Vec::new() };
        let fences = if self.dice.once_in(4) { vec![self.known_lock()] } else { Vec::new() };
        let mut retained = Vec::new();
        if self.dice.once_in(15) {
            let mut kept = Retained::default();
            kept.coverage.intervals.insert(interval(&mut self.dice));
            retained.push((node_id(self.dice.below(NODES)), kept));
        }
        Step { parts, locks, fences, retained }
    }

    fn part(&mut self, run: usize, there: &mut bool) -> Part {
        let dice = &mut self.dice;
        let mut mutations = Vec::new();
        if (!*there && !dice.once_in(8)) || dice.once_in(60) {
            mutations.push(creation(dice));
            *there = true;
        }
        mutations.extend((0..dice.below(4)).map(|_| mutation(dice)).collect::<Vec<_>>());
        if dice.once_in(9) {
            mutations.push(Mutation::Delete { keep_coverage: !dice.once_in(3) });
            *there = false;
            if dice.once_in(20) {
                mutations.push(mutation(dice));
            }
        }
        let conditions = if dice.once_in(3) { (0..=dice.below(2)).map(|_| condition(dice)).collect() } else { Vec::new() };
        Part { run, conditions, mutations, after: !dice.once_in(5) }
    }

    fn lock(&mut self, hot: usize) -> Lock {
        match self.dice.below(8) {
            0..=2 => {
                self.locks += 1;
                let dice = &mut self.dice;
                let run = if dice.once_in(2) { hot } else { dice.below(RUNS) };
                let node = if dice.once_in(3) { None } else { Some(dice.below(NODES)) };
                Lock::Grant { run, node, ttl_ms: dice.one_of(&[0, 3_600_000, 3_600_000, u64::MAX]), lock: self.locks }
            }
            3 => {
                let lock = self.known_lock();
                Lock::Renew { lock, ttl_ms: self.dice.one_of(&[0, 7_200_000, u64::MAX]), wrong: self.dice.once_in(6) }
            }
            4..=6 => Lock::Release { lock: self.known_lock(), wrong: self.dice.once_in(6) },
            _ => Lock::Force { lock: self.known_lock() },
        }
    }

    /// One of the last.
    fn known_lock(&mut self) -> usize {
        self.locks.saturating_sub(self.dice.below(5))
    }
}

fn condition(dice: &mut Dice) -> Condition {
    match dice.below(9) {
        0 => Condition::Absent(dice.below(NODES)),
        1 => Condition::Status(dice.below(NODES)),
        2 => Condition::RunStatus,
        3 => Condition::RunVersion(u64::from(dice.once_in(2))),
        4 | 5 => Condition::NodeVersion(dice.below(NODES), dice.once_in(4)),
        _ => Condition::Unlocked,
    }
}

/// The first and the last microsecond of the calendar.
const ENDS: [i64; 2] = [-62_135_596_800_000_000, 253_402_300_799_999_999];

fn stamp(dice: &mut Dice) -> DateTime<Utc> {
    match dice.below(12) {
        0 => DateTime::<Utc>::MAX_UTC,
        1 => DateTime::<Utc>::MIN_UTC,
        2 => DateTime::from_timestamp(1_700_000_000, 999_999_999).unwrap(),
        // A leap second.
        3 => DateTime::from_timestamp(1_700_000_039, 1_500_000_000).unwrap(),
        4 => DateTime::from_timestamp_micros(dice.one_of(&ENDS)).unwrap(),
        5 => DateTime::from_timestamp(-1, 1).unwrap(),
        _ => DateTime::from_timestamp(1_700_000_000 + i64::try_from(dice.below(1000)).unwrap(), 0).unwrap(),
    }
}

fn number(dice: &mut Dice) -> u64 {
    let some = dice.below(100) as u64;
    dice.one_of(&[u64::MAX, i64::MAX.unsigned_abs(), i64::MAX.unsigned_abs() + 1, 0, (1 << 53) + 1, some])
}

fn text(dice: &mut Dice) -> &'static str {
    dice.one_of(&[
        "",
        "\0",
        "a\0b",
        "\"q",
        "\"",
        "{\"x\":1}",
        "null",
        "\u{feff}",
        "\u{10ffff}\u{fffe}",
        "1e999",
        "\\u0000",
        "\0\"",
        "x",
        "NaN",
    ])
}

fn interval(dice: &mut Dice) -> Interval {
    let mut edge = || match dice.below(14) {
        0 => ENDS[0],
        1 => ENDS[1],
        2 => ENDS[0] + 1,
        3 => ENDS[1] - 1,
        _ => 1_700_000_000_000_000 + i64::try_from(dice.below(20)).unwrap(),
    };
    loop {
        let (from, to) = (edge(), edge());
        if from < to {
            let at = |micros| DateTime::from_timestamp_micros(micros).unwrap();
            return Interval::new(at(from), at(to)).unwrap();
        }
    }
}

fn raw(text: &str) -> RawJson {
    RawJson::parse(text).unwrap()
}

fn update(dice: &mut Dice) -> NodeUpdate {
    let mut update = match dice.below(8) {
        0 => NodeUpdate::running(),
        1 => NodeUpdate::success(),
        2 => NodeUpdate::failed(text(dice)),
        3 => NodeUpdate::pending(),
        4 => NodeUpdate::status(NodeStatus::parse(text(dice))),
        5 => NodeUpdate::skipped(),
        _ => NodeUpdate::new(),
    };
    for _ in 0..dice.below(4) {
        update = match dice.below(12) {
            0 => update.started_at(stamp(dice)),
            1 => update.finished_at(stamp(dice)),
            2 => update.duration_ms(number(dice)),
            3 => update.row_count(number(dice)),
            4 => update.attempt(dice.one_of(&[0, 1, 2, u32::MAX])),
            5 => update.fingerprint(text(dice)),
            6 => update.error(text(dice)),
            7 => update.clear_error().clear_row_count().clear_fingerprint(),
            8 => update.metadata(text(dice), serde_json::json!({"t": text(dice), "f": 1e-300, "n": number(dice)})),
            9 => update.watermark(text(dice), text(dice)),
            10 => update.fingerprint(
                Fingerprint::from_raw(raw(dice.one_of(&[
                    r#"{"content_hash":1e+2,"b": "\u0000"}"#,
                    r#""\u0041bc""#,
                    r#"{ "z":-0.0 ,"a":123456789012345678901234567890}"#,
                ])))
                .unwrap(),
            ),
            _ => {
                let needed: Vec<String> = (0..dice.below(3)).map(|node| node_id(node).as_str().to_owned()).collect();
                update.depends_on(needed).max_attempts(dice.one_of(&[1, u32::MAX]))
            }
        };
    }
    update
}

fn mutation(dice: &mut Dice) -> Mutation {
    let node = node_id(dice.below(NODES));
    let partition = |dice: &mut Dice| PartitionKey::new(dice.one_of(&["p", "P", "p=\"1'", " "])).unwrap();
    match dice.below(14) {
        0 => {
            let status = text(dice);
            let mut update = dice.one_of(&[
                RunUpdate::success(),
                RunUpdate::running(),
                RunUpdate::status(RunStatus::parse(status)),
                RunUpdate::new(),
            ]);
            if dice.once_in(2) {
                update = update.metadata(text(dice), text(dice));
            }
            if dice.once_in(3) {
                update = update.started_at(stamp(dice)).finished_at(stamp(dice));
            }
            Mutation::Update { update, at: stamp(dice) }
        }
        1 | 2 => Mutation::DeleteNode { node },
        3 | 4 => Mutation::AddInterval { node, interval: interval(dice) },
        5 | 6 => Mutation::RemoveInterval { node, interval: interval(dice) },
        7 => Mutation::AddPartition { node, partition: partition(dice) },
        8 => Mutation::RemovePartition { node, partition: partition(dice) },
        _ => Mutation::SetNode { node, update: Box::new(update(dice)), at: stamp(dice) },
    }
}

fn creation(dice: &mut Dice) -> Mutation {
    if !dice.once_in(3) {
        let status = if dice.once_in(4) { RunStatus::Success } else { RunStatus::Running };
        return Mutation::Create { run: NewRun::status(status).metadata("k", text(dice)), at: stamp(dice) };
    }
    let mut header = RunHeader::new(RunStatus::parse(text(dice)), time::to_micros(stamp(dice)));
    header.started_at = Some(time::to_micros(stamp(dice)));
    let mut nodes = BTreeMap::new();
    for number_of in 0..dice.below(NODES) {
        let mut node = NodeState::new(if dice.once_in(2) { NodeStatus::Success } else { NodeStatus::parse(text(dice)) });
        node.row_count = Some(number(dice));
        node.finished_at = Some(time::to_micros(stamp(dice)));
        node.error = Some(text(dice).into());
        node.attempt = u32::MAX;
        if dice.once_in(2) {
            node.extra = Some(raw(r#"{"z":1e-300,"nul":"\u0000","esc":"\u65e5\/x","neg":-0.0, "dup":1,"dup":2}"#));
        }
        if dice.once_in(3) {
            node.metadata = Metadata::from_raw(&raw(r#"{"z":1e-300,"a":-0.0,"k":1E+2}"#)).unwrap();
        }
        Arc::make_mut(&mut node.intervals).extend([interval(dice), interval(dice)]);
        node.worker = Some(text(dice).into());
        nodes.insert(node_id(number_of), Arc::new(node));
    }
    Mutation::Import(Box::new(RunImport { header, nodes }))
}
