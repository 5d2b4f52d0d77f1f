//! TLS for connections, by rustls with ring.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::Socket;
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect};
use tokio_rustls::{TlsConnector, client};

use super::place::{Place, Protection};
use super::x509::OldKey;
use crate::store::{StoreError, StoreErrorKind};

/// Makes TLS sessions.
#[derive(Clone)]
pub(super) struct MakeTls(TlsConnector);

impl MakeTls {
    /// What the place asks for.
    pub(super) fn of(place: &Place) -> Result<Self, StoreError> {
        let refuse = |why: String| StoreError::not_applied(StoreErrorKind::Input, why);
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| refuse(format!("TLS: {error}")))?;
        let config = if place.protection == Protection::Verified {
            let mut roots = RootCertStore::empty();
            match &place.ca_file {
                None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
                Some(path) => {
                    let bad =
                        |why: String| refuse(format!("CA file {}: {why}; it must hold certificates in PEM form", path.display()));
                    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| bad(error.to_string()))? {
                        let certificate = certificate.map_err(|error| bad(error.to_string()))?;
                        roots.add(certificate).map_err(|error| bad(error.to_string()))?;
                    }
                    if roots.is_empty() {
                        return Err(bad("there is no certificate in it".to_owned()));
                    }
                }
            }
            builder.with_root_certificates(roots).with_no_client_auth()
        } else {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate(provider))).with_no_client_auth()
        };
        Ok(Self(TlsConnector::from(Arc::new(config))))
    }
}

/// Takes every certificate: what `prefer` and `require` mean. Who holds it must still prove it.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.0.signature_verification_algorithms;
        match OldKey::of(cert) {
            Some(key) => key.verify_tls12(message, dss, known),
            None => verify_tls12_signature(message, cert, dss, known),
        }
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.0.signature_verification_algorithms;
        match OldKey::of(cert) {
            Some(key) => key.verify_tls13(message, dss, known),
            None => verify_tls13_signature(message, cert, dss, known),
        }
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// A session to one host.
pub(super) struct ToHost {
    connector: TlsConnector,
    host: ServerName<'static>,
}

impl MakeTlsConnect<Socket> for MakeTls {
    type Stream = TlsStream;
    type TlsConnect = ToHost;
    type Error = io::Error;

    fn make_tls_connect(&mut self, domain: &str) -> io::Result<ToHost> {
        // A Unix socket has no name, and is never encrypted.
        let domain = if domain.is_empty() { "localhost" } else { domain };
        let host = ServerName::try_from(domain.to_owned()).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        Ok(ToHost { connector: self.0.clone(), host })
    }
}

impl TlsConnect<Socket> for ToHost {
    type Stream = TlsStream;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<TlsStream>> + Send>>;

    fn connect(self, socket: Socket) -> Self::Future {
        Box::pin(async move { self.connector.connect(self.host, socket).await.map(|stream| TlsStream(Box::new(stream))) })
    }
}

/// A protected stream.
pub(super) struct TlsStream(Box<client::TlsStream<Socket>>);

impl tokio_postgres::tls::TlsStream for TlsStream {
    fn channel_binding(&self) -> ChannelBinding {
        ChannelBinding::none()
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_shutdown(cx)
    }
}
