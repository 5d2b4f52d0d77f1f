//! A server that answers as a test says: for what no real one does on command.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use super::client::Client;
use super::url::Target;

/// What it says to a statement.
pub(super) enum Say {
    /// One row of whole numbers; none for no row.
    Row(&'static [i64]),
    /// An error of this statement, by its code: the rest of the transaction is left out.
    Error(&'static str),
    /// A status that answers the whole request.
    Status(u16),
}

/// The server. Dropping it ends it.
pub(super) struct Fake {
    port: u16,
    ended: Arc<AtomicBool>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        drop(TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)));
    }
}

impl Fake {
    /// Starts it; `answer` is asked about every statement that runs.
    pub(super) fn start(mut answer: impl FnMut(&str) -> Say + Send + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let ended = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&ended);
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                let Some(request) = request(&mut stream) else { continue };
                let (status, body) = reply(&request, &mut answer);
                let head = format!("HTTP/1.1 {status} said\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
                let _nobody_waits = stream.write_all(format!("{head}{body}").as_bytes()).is_err();
            }
        });
        Self { port, ended }
    }

    /// A client of it.
    pub(super) fn client(&self) -> Client {
        client(self.port)
    }
}

/// A client of whatever listens there.
pub(super) fn client(port: u16) -> Client {
    Client::new(&Target::parse(&format!("http://127.0.0.1:{port}"), None, None).unwrap()).unwrap()
}

/// The body of a request.
fn request(stream: &mut TcpStream) -> Option<Value> {
    let (mut bytes, mut chunk) = (Vec::new(), vec![0; 64 * 1024]);
    loop {
        let read = stream.read(&mut chunk).ok().filter(|read| *read > 0)?;
        bytes.extend_from_slice(chunk.get(..read)?);
        let Some(head) = bytes.windows(4).position(|four| four == b"\r\n\r\n").map(|end| end + 4) else { continue };
        let text = String::from_utf8_lossy(bytes.get(..head)?).to_ascii_lowercase();
        let length: usize = text.lines().find_map(|line| line.strip_prefix("content-length:"))?.trim().parse().ok()?;
        if let Some(body) = bytes.get(head..head + length) {
            return serde_json::from_slice(body).ok();
        }
    }
}

fn reply(request: &Value, answer: &mut impl FnMut(&str) -> Say) -> (u16, String) {
    let (mut results, mut errors, mut failed) = (Vec::new(), Vec::new(), false);
    for step in request["requests"][0]["batch"]["steps"].as_array().unwrap() {
        let sql = step["stmt"]["sql"].as_str().unwrap();
        let (mut result, mut error) = (Value::Null, Value::Null);
        if !failed && sql != "ROLLBACK" {
            match answer(sql) {
                Say::Row(row) => {
                    let row: Vec<Value> = row.iter().map(|n| json!({"type": "integer", "value": n.to_string()})).collect();
                    result = json!({"cols": [], "rows": if row.is_empty() { vec![] } else { vec![row] }});
                }
                Say::Error(code) => error = json!({"message": "a test wants it so", "code": code}),
                Say::Status(status) => return (status, "a test wants it so".to_owned()),
            }
        }
        failed |= error != Value::Null;
        results.push(result);
        errors.push(error);
    }
    let result = json!({"type": "batch", "result": {"step_results": results, "step_errors": errors}});
    (200, json!({"results": [{"type": "ok", "response": result}]}).to_string())
}
