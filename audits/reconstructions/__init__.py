"""``privkd audit reconstruction``: can anyone rebuild what was on the device?"""
