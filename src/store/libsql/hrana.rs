//! The protocol, Hrana 3 over HTTP, as far as it is spoken here: one pipeline of one conditional batch, and `close`.

use std::borrow::Cow;

use serde::ser::{SerializeSeq, SerializeStruct};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A value that goes to the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Arg {
    Integer(i64),
    Text(String),
    /// Bytes, in base64 as the server writes them.
    Blob(String),
}

impl From<&str> for Arg {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Arg {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<u64> for Arg {
    fn from(number: u64) -> Self {
        i64::try_from(number).map_or_else(|_| Self::Text(number.to_string()), Self::Integer)
    }
}

impl From<i64> for Arg {
    fn from(number: i64) -> Self {
        Self::Integer(number)
    }
}

impl Serialize for Arg {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut value = serializer.serialize_struct("Value", 2)?;
        match self {
            Self::Integer(number) => {
                value.serialize_field("type", "integer")?;
                // As text: JSON numbers beyond 53 bits are rounded by some who read them.
                value.serialize_field("value", &number.to_string())?;
            }
            Self::Text(text) => {
                value.serialize_field("type", "text")?;
                value.serialize_field("value", text)?;
            }
            Self::Blob(base64) => {
                value.serialize_field("type", "blob")?;
                value.serialize_field("base64", base64)?;
            }
        }
        value.end()
    }
}

/// One statement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Stmt {
    pub(super) sql: Cow<'static, str>,
    pub(super) args: Vec<Arg>,
    pub(super) want_rows: bool,
    /// The table that it is about, for errors.
    #[serde(skip)]
    pub(super) place: &'static str,
}

impl Stmt {
    /// A statement whose rows nobody wants.
    pub(super) fn exec(sql: impl Into<Cow<'static, str>>, args: Vec<Arg>) -> Self {
        Self { sql: sql.into(), args, want_rows: false, place: "" }
    }

    /// A question about a table.
    pub(super) fn ask(place: &'static str, sql: impl Into<Cow<'static, str>>, args: Vec<Arg>) -> Self {
        Self { sql: sql.into(), args, want_rows: true, place }
    }
}

/// When a step runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Cond {
    Ok { step: usize },
    Not { cond: Box<Cond> },
    And { conds: Vec<Cond> },
}

/// Statements that happen as one: `BEGIN`, each statement if the one before it went well, `COMMIT`, and `ROLLBACK` if that was not reached.
#[derive(Debug)]
pub(super) struct Batch<'s> {
    /// Whether it takes the one place of the writer at its start. Replicas pass it on to their primary.
    pub(super) exclusive: bool,
    /// Whether it changes something: then a lost answer leaves its outcome unknown.
    pub(super) writes: bool,
    pub(super) statements: &'s [Stmt],
    /// The state of the primary that a replica must have reached before it answers.
    pub(super) replication_index: Option<u64>,
}

impl Batch<'_> {
    /// The step of the statement with this index.
    pub(super) fn step_of(index: usize) -> usize {
        index + 1
    }

    /// The step of `COMMIT`.
    pub(super) fn commit_step(&self) -> usize {
        self.statements.len() + 1
    }
}

struct Step<'s> {
    condition: Option<Cond>,
    stmt: &'s Stmt,
}

impl Serialize for Step<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut step = serializer.serialize_struct("Step", 2)?;
        match &self.condition {
            Some(condition) => step.serialize_field("condition", condition)?,
            None => step.skip_field("condition")?,
        }
        step.serialize_field("stmt", self.stmt)?;
        step.end()
    }
}

struct Steps<'b, 's>(&'b Batch<'s>);

impl Serialize for Steps<'_, '_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let begin = Stmt::exec(if self.0.exclusive { "BEGIN IMMEDIATE" } else { "BEGIN" }, Vec::new());
        let commit = Stmt::exec("COMMIT", Vec::new());
        let rollback = Stmt::exec("ROLLBACK", Vec::new());
        let last = self.0.commit_step();
        let mut steps = serializer.serialize_seq(Some(last + 2))?;
        let middle = self.0.statements.iter().chain([&commit]);
        steps.serialize_element(&Step { condition: None, stmt: &begin })?;
        for (before, stmt) in middle.enumerate() {
            steps.serialize_element(&Step { condition: Some(Cond::Ok { step: before }), stmt })?;
        }
        let failed = Cond::Not { cond: Box::new(Cond::Ok { step: last }) };
        let condition = Some(Cond::And { conds: vec![Cond::Ok { step: 0 }, failed] });
        steps.serialize_element(&Step { condition, stmt: &rollback })?;
        steps.end()
    }
}

impl Serialize for Batch<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut batch = serializer.serialize_struct("Batch", 2)?;
        batch.serialize_field("steps", &Steps(self))?;
        match self.replication_index {
            Some(index) => batch.serialize_field("replication_index", &index.to_string())?,
            None => batch.skip_field("replication_index")?,
        }
        batch.end()
    }
}

/// What is sent: the batch, and the end of the stream.
pub(super) struct Pipeline<'b, 's>(pub(super) &'b Batch<'s>);

impl Serialize for Pipeline<'_, '_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        #[serde(tag = "type", rename_all = "snake_case")]
        enum Request<'b, 's> {
            Batch { batch: &'b Batch<'s> },
            Close,
        }
        let mut pipeline = serializer.serialize_struct("Pipeline", 1)?;
        pipeline.serialize_field("requests", &[Request::Batch { batch: self.0 }, Request::Close])?;
        pipeline.end()
    }
}

/// A value that the server answers with.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Value {
    Null,
    Integer {
        #[serde(deserialize_with = "integer")]
        value: i64,
    },
    Float {
        /// None for what is no finite number: JSON has none.
        value: Option<f64>,
    },
    Text {
        value: String,
    },
    /// Bytes, which no column of ours holds.
    Blob {
        base64: String,
    },
    /// Text that is not UTF-8, in bytes behind a mark that says so; see `garbled`.
    #[serde(skip)]
    Garbled {
        base64: String,
    },
}

impl Value {
    /// What it is, for errors.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "NULL",
            Self::Integer { .. } => "an integer",
            Self::Float { .. } => "a real number",
            Self::Text { .. } => "text",
            Self::Blob { .. } => "bytes",
            Self::Garbled { .. } => "text that is not UTF-8",
        }
    }
}

/// The bytes that base64 stands for, whether or not it is filled up at its end. For names in messages: not worth a crate more for everybody who uses a server.
pub(super) fn bytes_of(base64: &str) -> Vec<u8> {
    let (mut bytes, mut held, mut bits) = (Vec::new(), 0_u16, 0_u8);
    for letter in base64.bytes() {
        let six = match letter {
            b'A'..=b'Z' => letter - b'A',
            b'a'..=b'z' => letter - b'a' + 26,
            b'0'..=b'9' => letter - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => continue,
        };
        (held, bits) = (held << 6 | u16::from(six), bits + 6);
        if let Some(left) = bits.checked_sub(8) {
            bytes.extend(u8::try_from(held >> left));
            (held, bits) = (held & ((1 << left) - 1), left);
        }
    }
    bytes
}

fn integer<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    let text = Cow::<'de, str>::deserialize(deserializer)?;
    text.parse().map_err(serde::de::Error::custom)
}

/// A row.
pub(super) type Row = Vec<Value>;

/// What a statement answered.
#[derive(Debug, Default, Deserialize)]
pub(super) struct StmtResult {
    #[serde(default)]
    pub(super) cols: Vec<Column>,
    pub(super) rows: Vec<Row>,
    #[serde(default)]
    affected_row_count: u64,
}

/// A column of an answer.
#[derive(Debug, Deserialize)]
pub(super) struct Column {
    pub(super) name: Option<String>,
}

/// Why the server refused something.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct ServerError {
    pub(super) message: String,
    #[serde(default)]
    pub(super) code: Option<String>,
}

impl ServerError {
    pub(super) fn code(&self) -> &str {
        self.code.as_deref().unwrap_or("")
    }
}

/// What a batch answered: for every step its result, its error, or neither if it was left out.
#[derive(Debug, Default, Deserialize)]
pub(super) struct BatchResult {
    pub(super) step_results: Vec<Option<StmtResult>>,
    pub(super) step_errors: Vec<Option<ServerError>>,
    #[serde(default)]
    pub(super) replication_index: Option<Index>,
}

impl BatchResult {
    /// Whether a step ran and went well.
    pub(super) fn is_ok(&self, step: usize) -> bool {
        self.step_results.get(step).is_some_and(Option::is_some)
    }

    /// The step that failed first, and why.
    pub(super) fn first_error(&self) -> Option<(usize, &ServerError)> {
        self.step_errors.iter().enumerate().find_map(|(step, error)| Some((step, error.as_ref()?)))
    }

    /// Takes a secret out of what is said about the steps that failed.
    pub(super) fn hide(&mut self, secret: &str) {
        for error in self.step_errors.iter_mut().flatten() {
            error.message = super::fault::hide(&error.message, secret);
        }
    }

    /// How many rows a step changed.
    pub(super) fn affected(&self, step: usize) -> u64 {
        self.step_results.get(step).and_then(Option::as_ref).map_or(0, |result| result.affected_row_count)
    }

    /// What a step answered.
    pub(super) fn take(&mut self, step: usize) -> StmtResult {
        self.step_results.get_mut(step).and_then(Option::take).unwrap_or_default()
    }
}

/// A replication index: text in some servers, a number in others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Index(pub(super) u64);

impl<'de> Deserialize<'de> for Index {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(u64),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Number(number) => Ok(Self(number)),
            Written::Text(text) => text.parse().map(Self).map_err(serde::de::Error::custom),
        }
    }
}

/// What one request of a pipeline became.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Outcome {
    Ok { response: Response },
    Error { error: ServerError },
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Response {
    Batch { result: BatchResult },
    Close,
}

#[derive(Debug, Deserialize)]
struct Answer {
    results: Vec<Outcome>,
}

/// What a pipeline's answer says of its batch.
pub(super) fn read_answer(body: &[u8]) -> Result<Result<BatchResult, ServerError>, String> {
    let answer: Answer = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    match answer.results.into_iter().next() {
        Some(Outcome::Ok { response: Response::Batch { result } }) => Ok(Ok(result)),
        Some(Outcome::Error { error }) => Ok(Err(error)),
        Some(Outcome::Ok { response: Response::Close }) | None => Err("it does not answer the batch".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipeline_is_one_conditional_batch_and_close() {
        let statements =
            [Stmt::exec("INSERT INTO t VALUES (?)", vec![Arg::Integer(-5)]), Stmt::ask("t", "SELECT ?", vec!["x".into()])];
        let batch = Batch { exclusive: true, writes: true, statements: &statements, replication_index: Some(7) };
        assert_eq!((Batch::step_of(0), batch.commit_step()), (1, 3));
        let found: serde_json::Value = serde_json::from_str(&serde_json::to_string(&Pipeline(&batch)).unwrap()).unwrap();
        let expected = serde_json::json!({"requests": [
            {"type": "batch", "batch": {"replication_index": "7", "steps": [
                {"stmt": {"sql": "BEGIN IMMEDIATE", "args": [], "want_rows": false}},
                {"condition": {"type": "ok", "step": 0},
                 "stmt": {"sql": "INSERT INTO t VALUES (?)", "args": [{"type": "integer", "value": "-5"}], "want_rows": false}},
                {"condition": {"type": "ok", "step": 1},
                 "stmt": {"sql": "SELECT ?", "args": [{"type": "text", "value": "x"}], "want_rows": true}},
                {"condition": {"type": "ok", "step": 2}, "stmt": {"sql": "COMMIT", "args": [], "want_rows": false}},
                {"condition": {"type": "and", "conds": [{"type": "ok", "step": 0}, {"type": "not", "cond": {"type": "ok", "step": 3}}]},
                 "stmt": {"sql": "ROLLBACK", "args": [], "want_rows": false}},
            ]}},
            {"type": "close"},
        ]});
        assert_eq!(found, expected);
    }

    #[test]
    fn bytes_are_read_from_base64() {
        for (base64, bytes) in [
            ("", &b""[..]),
            ("AA", b"\0"),
            ("AAE", b"\0\x01"),
            ("AAE=", b"\0\x01"),
            ("cnVu", b"run"),
            ("cnVu/w==", b"run\xff"),
            ("+///", b"\xfb\xff\xff"),
        ] {
            assert_eq!(bytes_of(base64), bytes, "{base64}");
        }
    }

    #[test]
    fn answers_are_read_as_servers_write_them() {
        let body = br#"{"baton":null,"results":[{"type":"ok","response":{"type":"batch","result":{"step_results":[
            {"cols":[],"rows":[[{"type":"integer","value":"9223372036854775807"},{"type":"null"},{"type":"float","value":1.5},
            {"type":"text","value":"a\u0000b"},{"type":"blob","base64":"AAE"}]],"affected_row_count":0},null],
            "step_errors":[null,{"message":"no","code":"X"}],"replication_index":"12"}}},{"type":"ok","response":{"type":"close"}}]}"#;
        let mut result = read_answer(body).unwrap().unwrap();
        assert_eq!(result.replication_index, Some(Index(12)));
        assert_eq!(result.first_error().map(|(step, error)| (step, error.code())), Some((1, "X")));
        assert!(result.is_ok(0) && !result.is_ok(1) && !result.is_ok(2));
        let text = Value::Text { value: "a\0b".to_owned() };
        let bytes = Value::Blob { base64: "AAE".to_owned() };
        let row = vec![Value::Integer { value: i64::MAX }, Value::Null, Value::Float { value: Some(1.5) }, text, bytes];
        assert_eq!(result.take(0).rows, vec![row]);

        let refused = br#"{"results":[{"type":"error","error":{"message":"no"}}]}"#;
        assert_eq!(read_answer(refused).unwrap().unwrap_err().code(), "");
        for bad in [&b"Unauthorized"[..], b"", b"{}", br#"{"results":[]}"#, b"\xff\xfe"] {
            read_answer(bad).unwrap_err();
        }
    }
}
