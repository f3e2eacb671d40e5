"""A key of an issuer, and tokens of it: keys as JWKS, a good token, one that has expired, one of another key, one of
another subject. One a line. Arguments: a directory for the keys, and the id of the key."""
import base64, json, subprocess, time, sys
def run(*args, data=None): return subprocess.run(args, input=data, capture_output=True, check=True).stdout
def b64(raw): return base64.urlsafe_b64encode(raw).rstrip(b'=').decode()
def key(name):
    path = sys.argv[1] + '/' + name
    run('openssl', 'genrsa', '-out', path, '2048')
    modulus = run('openssl', 'rsa', '-in', path, '-noout', '-modulus').decode().strip().split('=')[1]
    return path, b64(bytes.fromhex(modulus))
kid = sys.argv[2]
path, modulus = key('issuer.pem')
other, _ = key('other.pem')
def token(path, **claims):
    said = {'iss': 'https://issuer.example', 'sub': 'alice', 'role': ['admin'], 'exp': int(time.time()) + 3600, **claims}
    parts = b64(json.dumps({'alg': 'RS256', 'kid': kid}).encode()) + '.' + b64(json.dumps(said).encode())
    return parts + '.' + b64(run('openssl', 'dgst', '-sha256', '-sign', path, data=parts.encode()))
print(json.dumps({'keys': [{'kty': 'RSA', 'kid': kid, 'alg': 'RS256', 'n': modulus, 'e': 'AQAB'}]}))
print(token(path))
print(token(path, exp=1000000000))
print(token(other))
print(token(path, role=['guest']))
